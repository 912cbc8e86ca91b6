"""Existing images: which folders belong together, what is scored, and what is said not to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ether_diffusion.cli.programs.pictures import subject_fidelity as main
from ether_diffusion.evaluation.overview import write_report
from ether_diffusion.evaluation.subjects.folders import score_folders
from ether_diffusion.metrics.generated import pair_folders, read_pictures
from ether_diffusion.metrics.judges import load_judges
from ether_diffusion.metrics.scoring import Judges
from ether_diffusion.playground.world import draw, random_scene


@pytest.fixture(scope="module")
def judges() -> Judges:
    return load_judges("playground", "playground")


def pictures(folder: Path, numbers: range) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{number:02d}.png" for number in numbers]
    for number, path in zip(numbers, paths, strict=True):
        draw(random_scene(4, number)).image.save(path)
    return paths


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Generated images and references of a dog and a backpack with a dog on it."""
    generated, references = tmp_path / "lora", tmp_path / "photos"
    for name, start in (("backpack_dog", 0), ("dog", 3)):
        pictures(generated / name, range(start, start + 3))
        pictures(references / name, range(start + 10, start + 12))
    return generated, references


def test_subjects_are_paired_by_their_whole_names(folders: tuple[Path, Path]) -> None:
    generated, references = folders
    pairs, lonely = pair_folders(generated, references)
    assert {name: (a.name, b.name) for name, (a, b) in pairs.items()} == {
        name: (name, name) for name in ("backpack_dog", "dog")
    }
    assert lonely == {}
    (references / "dog").rename(references / "dog2")
    pairs, lonely = pair_folders(generated, references)
    assert list(pairs) == ["backpack_dog"]
    assert set(lonely) == {str(generated / "dog"), str(references / "dog2")}


def test_flat_folders_are_one_subject(folders: tuple[Path, Path]) -> None:
    generated, references = folders
    pairs, _ = pair_folders(generated / "dog", references / "dog")
    assert pairs == {"dog": (generated / "dog", references / "dog")}
    for mine, theirs in ((generated / "dog", references), (generated, generated.parent)):
        with pytest.raises(ValueError, match="neither two folders of pictures nor two of folders with the same names"):
            pair_folders(mine, theirs)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pair_folders(generated / "nowhere", references)


def test_pictures_beside_subjects_and_folders_inside_them_are_told(folders: tuple[Path, Path]) -> None:
    generated, references = folders
    for folder in folders:
        draw(random_scene(4, 50)).image.save(folder / "grid.png")
    pairs, strays = pair_folders(generated, references)
    assert list(pairs) == ["backpack_dog", "dog"]
    assert set(strays) == {str(generated / "grid.png"), str(references / "grid.png")}
    pictures(generated / "dog" / "more", range(60, 61))
    (generated / "dog" / ".hidden").write_bytes(b"")
    assert set(read_pictures(generated / "dog").refused) == {str(generated / "dog" / "more")}


def test_prompts_are_matched_by_file_and_what_is_no_picture_is_told(folders: tuple[Path, Path]) -> None:
    folder = folders[0] / "dog"
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "04.png", "prompt": "a qwe dog"}\n{"file_name": "05.png", "text": "a dog"}\n'
        '{"file_name": "09.png", "prompt": "gone"}\n'
    )
    (folder / "04b.png").write_bytes(b"no picture")
    found = read_pictures(folder)
    assert [path.name for path in found.paths] == ["03.png", "04.png", "05.png"]
    assert found.prompts == [None, "a qwe dog", "a dog"]
    assert set(found.refused) == {str(folder / "04b.png"), str(folder / "09.png")}
    (folder / "metadata.jsonl").write_text('{"file": "04.png"}\n')
    with pytest.raises(ValueError, match=r"line 1: .*file_name"):
        read_pictures(folder)


def test_scores_are_the_means_of_the_pairs(judges: Judges, folders: tuple[Path, Path], tmp_path: Path) -> None:
    generated, references = folders
    (generated / "dog" / "metadata.jsonl").write_text('{"file_name": "04.png", "prompt": "a qwe dog"}')
    table, refused = score_folders(generated, references, judges, tmp_path / "out", "qwe")
    assert refused == {}
    assert "| lora |" in table
    (real, row) = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    means = []
    for name in ("backpack_dog", "dog"):
        mine, theirs = (
            judges.dino.image_features(sorted((folder / name).glob("*.png"))) for folder in (generated, references)
        )
        means.append((mine @ theirs.T).mean().item())
    assert row["scores"]["dino"]["mean"] == pytest.approx(sum(means) / 2, abs=1e-6)
    assert row["images"] == 6
    assert real["arm"] == "real images"
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert [line["file"] for line in lines if "clip_t" in line] == ["04.png"]
    assert len(lines[0]["pairs"]["dino"]) == len(lines[0]["references"]) == 2
    page = write_report([tmp_path / "out"], tmp_path / "page.html").read_text()
    assert page.count("data:image/webp") == 4 + 1  # the references of both, and the one picture whose prompt is known


def test_the_program_counts_and_names_what_it_could_not_score(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    generated, references = folders
    (generated / "dog" / "00.png").write_bytes(b"")
    arguments = ["--generated", str(generated), "--references", str(references)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--dino", "playground", "--clip", "playground"])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "Not in these tables (1):" in out
    assert str(generated / "dog" / "00.png") in out
    assert (generated.parent / "lora-scores" / "scores.jsonl").is_file()
    with pytest.raises(SystemExit) as ended:
        main(["--generated", str(generated / "nowhere"), "--references", str(references)])
    assert ended.value.code == 2
