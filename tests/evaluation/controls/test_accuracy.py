"""Folders of originals, conditions and pictures: what belongs together, what is told, what is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.cli.programs.control_accuracy import main
from ether_diffusion.control.conditions import canny
from ether_diffusion.evaluation.controls.accuracy import ranked
from ether_diffusion.metrics import distribution
from ether_diffusion.metrics.control_tasks import Measure
from ether_diffusion.metrics.distribution import kernel_distance, load_feature_model
from ether_diffusion.metrics.generated import (
    Sample,
    read_generated,
    read_pairs,
    read_samples,
    write_generated_metadata,
)
from ether_diffusion.playground.world import draw, full_captions, random_scene

PLAYGROUND = ["--segmenter", "playground", "--clip", "playground", "--fid_features", "playground"]
PAIRS, EACH = 5, 2


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Five scenes with their maps, and for each the picture itself and a noised one."""
    data, generated = tmp_path / "data", tmp_path / "plain"
    for folder in (data / "images", data / "conditions", generated):
        folder.mkdir(parents=True)
    lines, samples = [], []
    for number in range(PAIRS):
        scene, name = random_scene(41, number), f"{number:04d}.png"
        drawing = draw(scene)
        drawing.image.save(data / "images" / name)
        Image.fromarray(drawing.semantic_map).save(data / "conditions" / name)
        line = {"file_name": f"images/{name}", "conditioning_image": f"conditions/{name}"}
        lines.append(json.dumps(line | {"text": full_captions(scene)[0]}))
        for each in range(EACH):
            file = f"{number:04d}-{each}.png"
            noise = np.random.default_rng(number).normal(0, 50 * each, (64, 64, 3))
            Image.fromarray((np.asarray(drawing.image) + noise).clip(0, 255).astype(np.uint8)).save(generated / file)
            samples.append(Sample(file, f"images/{name}", None if each else "a picture", each))
    (data / "metadata.jsonl").write_text("\n".join(lines))
    write_generated_metadata(generated, samples)
    return data, generated


def arguments(folders: tuple[Path, Path], task: str = "segmentation") -> list[str]:
    return ["--data", str(folders[0]), "--generated", str(folders[1]), "--task", task]


def test_what_is_written_is_read_again(folders: tuple[Path, Path]) -> None:
    data, generated = folders
    control = read_generated(data, generated, maps=True)
    assert control.refused == {}
    assert [pair.name for pair in control.pairs] == [f"images/{number:04d}.png" for number in range(PAIRS)]
    assert [[sample.file_name for sample in of_pair] for of_pair in control.samples][1] == ["0001-0.png", "0001-1.png"]
    assert read_samples(generated)[0] == Sample("0000-0.png", "images/0000.png", "a picture", 0)
    assert control.pairs[0].prompt is not None


def draw_folder(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        draw(random_scene(9, number)).image.save(folder / f"{number:04d}.png")


def test_scores_report_and_table(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main([*arguments(folders), *PLAYGROUND])
    out = capsys.readouterr().out
    assert "| mIoU ↑ |" in out
    assert "| KID ↓ |" not in out
    assert "Note: KID is left out: it needs 256 images of each kind, there are 2 real and 6 generated images." in out
    folder = folders[1].with_name("plain-control")
    results = json.loads((folder / "results.json").read_text())
    perfect, noisy = results["scores"]["miou"]["by_number"]
    assert perfect == results["originals"]["miou"] > 0.9 > noisy
    assert results["choices"]["other sizes"] == "refused"
    assert {"segmenter", "clip"} == set(results["judges"])  # nothing was compared by features
    assert sum("is left out: it needs" in warning for warning in results["warnings"]) == 2
    assert all(re.fullmatch(r"[0-9a-f]{12}", judge["weights"]) for judge in results["judges"].values())
    assert "torch" in results["libraries"]
    assert results["refused"] == {}
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == PAIRS * EACH
    assert rows[0]["file"] == "0000-0.png"
    assert rows[0]["prompt"] == "a picture"
    assert rows[1]["seed"] == 1
    assert np.mean([row["clip_t"] for row in rows]) == pytest.approx(results["scores"]["clip_t"]["overall"])
    page = (folder / "report.html").read_text()
    assert page.count("data:image/webp") == PAIRS * (2 + EACH) + PAIRS * EACH  # conditions, originals, samples, looks
    assert not re.search(r'(src|href)="(?!data:|https://arxiv)', page)
    assert "night_sky" in page or "sky" in page
    assert "FID is left out: it needs 2,048 images of each kind" in page


def test_fid_and_kid_against_another_folder(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution, "KID_ENOUGH", 10)
    (data, generated), real = folders, folders[0].with_name("real")
    draw_folder(real, 12)
    flags = [*arguments(folders), *PLAYGROUND, "--fid_originals"]
    main([*flags, str(real)])
    out = capsys.readouterr().out
    assert "Note: FID is left out: it needs 2,048 images of each kind with these features, there are 12 real" in out
    assert "Note: KID is of all samples as one set only: 5 pictures, one of each pair, are too few." in out
    judge = load_feature_model("playground")
    real_features = judge.raw_features(sorted(real.iterdir()))
    expected = kernel_distance(real_features, judge.raw_features(sorted(generated.glob("*.png"))))["kid"]
    results = json.loads((generated.with_name("plain-control") / "results.json").read_text())
    assert results["scores"]["kid"]["mean"] is None
    assert results["scores"]["kid"]["overall"] == pytest.approx(expected, rel=1e-5)
    assert "features" in results["judges"]

    (real / "0012.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as ended:
        main([*flags, str(real)])
    assert ended.value.code == 1
    assert f"  {real / '0012.png'}: " in capsys.readouterr().out

    main([*flags, str(data / "images")])  # coupled sets
    out = capsys.readouterr().out
    assert "Note: FID and KID leave out 5 of the real images: the scored pictures were drawn for them." in out
    assert "KID is left out: it needs 10 images of each kind, there are 0 real and 10 generated" in out

    (tmp := data.with_name("empty")).mkdir()
    assert f"--fid_originals {tmp} has no readable picture" in failing(folders, capsys, "--fid_originals", str(tmp))


def test_files_that_do_not_belong_together_are_named_and_end_with_1(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, generated = folders
    Image.new("RGB", (64, 64)).save(generated / "stray.png")
    (generated / "0001-0.png").unlink()
    (generated / "0001-1.png").write_bytes(b"no picture")
    (generated / "0002-1.png").write_bytes((generated / "0002-1.png").read_bytes()[:500])
    Image.open(data / "conditions" / "0003.png").convert("RGB").save(data / "conditions" / "0003.png")
    with (generated / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "0002-0.png.png", "pair": "images/9999.png"}\n')
    refused = read_generated(data, generated, maps=True).refused
    assert {
        str(Path(path).relative_to(data.parent)): reason.split(str(data.parent))[0] for path, reason in refused.items()
    } == {
        "plain/stray.png": "no line of metadata.jsonl says which pair it belongs to",
        "plain/0001-0.png": "named in metadata.jsonl, but not there",
        "plain/0001-1.png": "",
        "plain/0002-1.png": "",
        "plain/0002-0.png.png": "its pair images/9999.png is not in ",
        "plain/0003-0.png": "its pair images/0003.png cannot be read",
        "plain/0003-1.png": "its pair images/0003.png cannot be read",
        "data/conditions/0003.png": "",
        "data/images/0001.png": "no generated picture",
        "data/images/0002.png": "1 generated pictures, others have 2",
    }
    assert "semantic map holds one class id" in refused[str(data / "conditions" / "0003.png")]
    assert "cannot be decoded" in refused[str(generated / "0002-1.png")]
    with pytest.raises(SystemExit) as ended:
        main([*arguments(folders), *PLAYGROUND])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "Not scored, or not in full (10):" in out
    assert f"  {generated / 'stray.png'}: no line" in out
    assert "5 pictures of 3 pairs" in out


def failing(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], *more: str, task: str = "segmentation"
) -> str:
    with pytest.raises(SystemExit) as ended:
        main(
            [*arguments(folders, task), "--clip", "none", "--fid_features", "none", "--segmenter", "playground", *more]
        )
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_mistakes_are_one_line_that_says_what_to_do(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data, generated = folders
    assert "no picture of white edges on black" in failing(folders, capsys, task="canny")
    assert "--edges nowhere is none of hed, lineart" in failing(folders, capsys, "--edges", "nowhere", task="edges")
    assert "the playground is flat" in failing(folders, capsys, "--depth", "playground", task="depth")
    assert "thresholds must be 0 <= low <= high" in failing(
        folders, capsys, "--canny", "200", "100", "--from_originals", task="canny"
    )
    assert "the segmenter's 17 classes are the ids -9 to 7" in failing(folders, capsys, "--label_offset", "-9")
    assert "features 'vgg' are none of" in failing(folders, capsys, "--fid_features", "vgg")
    Image.open(data / "conditions" / "0002.png").resize((32, 32), 0).save(data / "conditions" / "0002.png")
    assert "images/0002.png: the condition has 32 x 32 pixels" in failing(folders, capsys)
    metadata = generated / "metadata.jsonl"
    text = metadata.read_text()
    for line, complaint in {
        "no json": 'line 1: {"file_name": "0001-0.png", "pair": "images/0001.png"',
        '{"file_name": "0000-0.png"}': "is expected, not {",
        '{"file_name": "0000-0.png", "pair": "images/0000.png", "seed": "three"}': "the seed a whole number",
        text.splitlines()[0] + "\n" + text.splitlines()[0]: "names 0000-0.png more than once",
        "": "nothing to score",
    }.items():
        metadata.write_text(line)
        assert complaint in failing(folders, capsys)
    metadata.unlink()
    assert f"{metadata} is missing: a line for every picture is expected" in failing(folders, capsys)
    assert "nowhere does not exist" in failing((data, tmp_path / "nowhere"), capsys)
    (data / "metadata.jsonl").write_text('{"file_name": "a.png", "conditioning_image": 3}')
    with pytest.raises(ValueError, match=r"line 1: .* is expected, not"):
        read_pairs(data)


def test_canny_from_originals_and_from_files(folders: tuple[Path, Path]) -> None:
    data = folders[0]
    more = ["--clip", "none", "--fid_features", "none", "--output_dir", str(data.parent / "out")]
    main([*arguments(folders, "canny"), *more, "--from_originals"])
    computed = json.loads((data.parent / "out" / "results.json").read_text())
    assert computed["scores"]["f1"]["by_number"][0] == 1.0 > computed["scores"]["f1"]["by_number"][1]
    assert computed["choices"]["thresholds"] == [100, 200]
    assert computed["conditions"] == {"given": 0, "computed": PAIRS}
    for number in range(PAIRS):
        canny(Image.open(data / "images" / f"{number:04d}.png")).save(data / "conditions" / f"{number:04d}.png")
    main([*arguments(folders, "canny"), *more])
    given = json.loads((data.parent / "out" / "results.json").read_text())
    assert given["scores"] == computed["scores"]
    assert given["originals"] == {"f1": 1.0, "iou": 1.0}


def test_edges_that_were_drawn_before(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data, generated = folders
    edges = data.parent / "hed"
    edges.mkdir()
    for path in generated.glob("*.png"):
        Image.open(path).convert("L").save(edges / path.name)
    more = ["--clip", "none", "--fid_features", "none", "--edges", str(edges), "--ms_ssim_scales", "3"]
    for number in range(PAIRS):
        Image.open(data / "images" / f"{number:04d}.png").convert("L").save(data / "conditions" / f"{number:04d}.png")
    with pytest.raises(SystemExit) as ended:  # the originals' own edges are not among them, and need not be
        main([*arguments(folders, "edges"), *more, "--from_originals"])
    assert ended.value.code == 2
    assert "holds the edges of generated pictures only" in capsys.readouterr().err
    main([*arguments(folders, "edges"), *more])
    results = json.loads((generated.with_name("plain-control") / "results.json").read_text())
    assert results["scores"]["ms_ssim"]["by_number"][0] == 1.0 > results["scores"]["ms_ssim"]["by_number"][1]
    assert results["choices"]["edges"] == "drawn before, hed"


def test_best_median_and_worst() -> None:
    up, down = Measure("miou", "mIoU"), Measure("rmse", "RMSE", higher_is_better=False)
    values = [0.5, 0.1, float("nan"), 0.9, 0.7]
    assert ranked(values, up, each=1) == [("best", 3), ("median", 4), ("worst", 1)]
    assert ranked(values, down, each=1) == [("best", 1), ("median", 0), ("worst", 3)]
    assert ranked(values, up, each=3) == [("best", 3), ("best", 4), ("worst", 0), ("worst", 1)]
    assert [rank for rank, _ in ranked(list(range(30)), up)] == ["best"] * 3 + ["median"] * 3 + ["worst"] * 3
    assert ranked([1.0], up) == [("best", 0)]


def test_files_outside_of_the_data_need_the_flag(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    listing = folders[0] / "metadata.jsonl"
    listing.write_text(listing.read_text().replace("images/0000.png", "../data/images/0000.png"))
    with pytest.raises(SystemExit):
        main([*arguments(folders), *PLAYGROUND])
    assert "line 1 names ../data/images/0000.png, which is not inside of the folder" in capsys.readouterr().err
    assert len(read_pairs(folders[0], allow_outside_paths=True)) == PAIRS
    samples = folders[1] / "metadata.jsonl"
    samples.write_text(samples.read_text().replace("0000-0.png", "/0000-0.png"))
    with pytest.raises(ValueError, match=r"line 1 names /0000-0.png, which is not inside"):
        read_samples(folders[1])


def test_an_id_that_is_none_is_told_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", "x", "--generated", "y", "--task", "segmentation", "--ignore_index", "void"])
    assert "'void' is no id: give a whole number, or none" in capsys.readouterr().err
