"""Scores of a run's samples: which images are compared with which, and where the numbers go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

from ether_diffusion import playground
from ether_diffusion.metrics.backbones import Picture, as_rgb
from ether_diffusion.metrics.judges import load_judges
from ether_diffusion.metrics.scoring import Judges
from ether_diffusion.playground.world import draw, random_scene
from ether_diffusion.runs import scores as scores_program
from ether_diffusion.runs.record import read_run
from ether_diffusion.runs.scores import NothingToScoreError, main, nearest_among, score_run

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


class Colours:
    """A judge whose feature of a one-coloured image is that colour, and of a prompt the colour it names."""

    identity = {"model": "colours", "weights": "c0ffee", "preprocessing": "the first pixel"}  # noqa: RUF012

    def __init__(self) -> None:
        self.read: list[str] = []
        self.seen = 0

    def image_features(self, images: Sequence[Picture], show: str | None = None) -> Tensor:
        self.seen += len(images)
        return torch.tensor([as_rgb(image).getpixel((0, 0)) for image in images]) / 255.0

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        self.read += prompts
        named = [[float(word in prompt) for word in ("red", "green", "blue")] for prompt in prompts]
        return torch.tensor(named)


def judges(clip: Colours | None = None) -> Judges:
    return Judges(Colours(), clip or Colours())  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on a red subject: the base drew green and blue, the finetuned model red and blue."""
    folder = tmp_path / "run"
    photos = [tmp_path / "photos" / name for name in ("0.png", "1.png")]
    for photo in photos:
        photo.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), RED).save(photo)
    for step, colours in ((0, (GREEN, BLUE)), (50, (GREEN, GREEN)), (100, (RED, BLUE))):
        grid = folder / "samples" / f"step-{step:06d}"
        grid.mkdir(parents=True)
        for number, colour in enumerate(colours):
            Image.new("RGB", (8, 8), colour).save(grid / f"{number:02d}.png")
    prompts = [{"file": "00.png", "prompt": "a red qwe dog", "seed": 0}]
    prompts += [{"file": "01.png", "prompt": "a blue qwe dog", "seed": 0}]
    (folder / "samples" / "prompts.json").write_text(json.dumps(prompts))
    config = {"pretrained_model_name_or_path": "playground", "method": "ether_plus", "max_train_steps": 100}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    known = {"instance_images": [str(photo) for photo in photos], "trained_parameters": {"unet": 3}, "step": 100}
    (folder / "provenance.json").write_text(json.dumps(known))
    return folder


SUBJECT = {"instance_prompt": "a photo of a qwe dog", "class_prompt": "a photo of a dog"}


def edit(run: Path, prompts: Sequence[str] = (), **settings: object) -> None:
    """Give the run's two samples other prompts, and its config more settings."""
    listing, config = run / "samples" / "prompts.json", run / "config.yaml"
    entries = json.loads(listing.read_text())
    for entry, prompt in zip(entries, prompts, strict=False):
        entry["prompt"] = prompt
    listing.write_text(json.dumps(entries))
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | settings))


def recorded(run: Path) -> dict[str, object]:
    return json.loads((run / "scores.json").read_text())


def written(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("scores.json", "report.html", "README.md")}


def test_the_base_and_the_last_samples_are_scored(run: Path) -> None:
    scores = score_run(run, judges())
    similarity = {"base": 0.0, "finetuned": 0.5, "references": 1.0}
    assert scores == {
        **dict.fromkeys(("DINO", "nearest reference", "CLIP-I"), similarity),
        "CLIP-T": {"base": 0.5, "finetuned": 1.0},
    }
    assert recorded(run)["scores"] == scores
    assert read_run(run).scores == scores
    assert "CLIP-I" in (run / "report.html").read_text()
    assert "CLIP-I" in (run / "README.md").read_text()
    assert "playground.load()" in (run / "README.md").read_text()


def test_prompts_are_read_without_the_token_and_as_written(run: Path) -> None:
    clip = Colours()
    scores = score_run(run, judges(clip), token="qwe")
    assert list(scores) == ["DINO", "nearest reference", "CLIP-I", "CLIP-T", "CLIP-T, prompt as written"]
    assert set(clip.read) == {"a red dog", "a blue dog", "a red qwe dog", "a blue qwe dog"}


def test_a_run_without_samples_of_its_base_has_no_base_scores(run: Path) -> None:
    for path in (run / "samples" / "step-000000").iterdir():
        path.unlink()
    (run / "samples" / "step-000000").rmdir()
    assert score_run(run, judges())["CLIP-T"] == {"finetuned": 1.0}


def test_what_is_missing_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run.parent / "photos" / "1.png").unlink()
    with pytest.raises(NothingToScoreError, match=r"gone: .*1\.png; put them back"):
        score_run(run, judges())
    with pytest.raises(SystemExit):
        main([str(run), "--dino", "playground", "--clip", "playground"])
    assert "1.png" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        score_run(run.parent, judges())


def test_a_run_before_its_first_samples_cannot_be_scored(run: Path) -> None:
    for step in ("step-000050", "step-000100"):
        for path in (run / "samples" / step).iterdir():
            path.unlink()
        (run / "samples" / step).rmdir()
    with pytest.raises(NothingToScoreError, match="no samples of the finetuned"):
        score_run(run, judges())


def test_copies_of_different_references_show_in_the_nearest_reference_alone(run: Path) -> None:
    Image.new("RGB", (8, 8), BLUE).save(run.parent / "photos" / "1.png")
    scores = score_run(run, judges())  # the finetuned model drew one picture like each reference
    assert scores["DINO"] == {"base": 0.25, "finetuned": 0.5, "references": 0.0}
    assert scores["nearest reference"] == {"base": 0.5, "finetuned": 1.0, "references": 0.0}


def test_the_nearest_among_references_is_never_the_reference_itself() -> None:
    features = F.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(3)), dim=1)
    best = [max(float(features[i] @ features[j]) for j in range(7) if j != i) for i in range(7)]
    assert nearest_among(features) == pytest.approx(sum(best) / 7, abs=1e-6)


def test_a_single_reference_has_no_nearest_other(run: Path) -> None:
    known = json.loads((run / "provenance.json").read_text())
    known["instance_images"] = known["instance_images"][:1]
    (run / "provenance.json").write_text(json.dumps(known))
    assert score_run(run, judges())["nearest reference"] == {"base": 0.0, "finetuned": 0.5}


def test_the_file_says_who_judged_what(run: Path) -> None:
    edit(run, seed=7, **SUBJECT)
    score_run(run, judges())
    found = recorded(run)
    colours = {"model": "colours", "weights": "c0ffee", "preprocessing": "the first pixel"}
    assert isinstance(found["judges"], dict)
    assert found["judges"].pop("libraries")["torch"] == version("torch")
    assert found["judges"] == {"dino": colours, "clip": colours}
    assert [found[key] for key in ("token", "seed", "step", "prompts")] == ["qwe", 7, 100, 2]
    assert found["images"] == {"base": 2, "finetuned": 2, "references": 2}
    judging = read_run(run).judging
    assert judging is not None
    assert judging.basis == "2 pictures of 2 prompts, one training, one seed (7)"
    assert 'without the rare word "qwe"' in judging.caption
    assert judging.caption.split(". ")[1] == "Finetuned is step 100"


@pytest.mark.parametrize(
    ("instance_prompt", "class_prompt", "prompts", "token"),
    [
        ("a photo of qwe dog", "a photo of a dog", [], "qwe"),  # the article is no rare word
        ("A photo of <s-1>, a Dog", "a photo of a dog", ["<s-1> dog", "red <s-1>"], "<s-1>"),
        ("a photo of a qwe dog", "a photo of a dog", ["a qwe dog", "a dog"], "qwe"),  # one prompt without it
        ("a photo of a qwe dog", "a photo of a dog", ["a qwe dog", "Qwe at night"], None),  # CLIP reads both alike
        ("a photo of a qwe dog", "a photo of a dog", ["a red dog", "a blue dog"], None),
        ("a photo of olis bel dog", "a photo of a dog", ["olis bel dog", "olis bel"], None),  # which of the two?
        ("a photo of a dog", "a photo of a dog", [], None),
        ("a photo of a qwe dog", None, [], None),
        (None, "a photo of a dog", [], None),
    ],
)
def test_the_token_is_what_the_instance_prompt_has_and_the_class_prompt_has_not(
    run: Path, instance_prompt: str | None, class_prompt: str | None, prompts: list[str], token: str | None
) -> None:
    edit(run, prompts, instance_prompt=instance_prompt, class_prompt=class_prompt)
    clip = Colours()
    scores = score_run(run, judges(clip))
    assert recorded(run)["token"] == token
    assert ("CLIP-T, prompt as written" in scores) is (token is not None)
    asked = [prompt["prompt"] for prompt in read_run(run).prompts]
    assert set(clip.read) == {*asked, *(" ".join(p.replace(token, "").split()) for p in asked if token)}


def test_a_token_that_is_given_goes_before_an_ambiguous_one(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(run, ["olis bel dog", "olis bel"], instance_prompt="a photo of olis bel dog", class_prompt="a photo of a dog")
    score_run(run, judges(), "olis bel")
    assert recorded(run)["token"] == "olis bel"
    assert caplog.messages == []
    score_run(run, judges(), "olis")
    assert caplog.messages == ["without 'olis' the prompts still have 'bel'"]


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("xyz", "no prompt has the word 'xyz'"),
        ("qw", "no prompt has the word 'qw'"),
        ("", "the token is empty: give 'qwe', or leave it out"),
        (" ", "the token is empty"),
        ("dog", "'dog', a word of the class prompt 'a photo of a dog', which CLIP-T needs: give 'qwe'"),
        ("Dog", "'Dog', a word of the class prompt"),
        ("qwe dog", "'dog', a word of the class prompt"),
        ("sks", "the token 'sks' is not the rare word of this run"),
    ],
)
def test_a_wrong_token_ends_before_the_judges_and_changes_no_file(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token: str, reason: str
) -> None:
    edit(run, ["a red qwe dog", "a blue qwe dog beside a sks cat"], **SUBJECT)
    score_run(run, judges())
    before = written(run)
    dino = Colours()
    with pytest.raises(ValueError, match="token"):
        score_run(run, Judges(dino, dino), token)  # type: ignore[arg-type]
    assert (dino.seen, dino.read) == (0, [])

    def load(given: object) -> Judges:
        raise AssertionError("the judges are loaded for nothing")

    monkeypatch.setattr(scores_program, "judges_of", load)
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--token", token])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert reason in error
    assert written(run) == before


def test_a_sample_that_cannot_be_read_changes_no_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score_run(run, judges())
    before = written(run)
    (run / "samples" / "step-000100" / "01.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--dino", "playground", "--clip", "playground"])
    assert stop.value.code == 2
    assert "step-000100/01.png" in capsys.readouterr().err
    assert written(run) == before


def test_the_program_prints_the_table_and_what_it_rests_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run, **SUBJECT)
    main([str(run), "--dino", "playground", "--clip", "playground"])
    heading, *rows, caption = capsys.readouterr().out.splitlines()
    assert heading.split() == ["base", "finetuned", "references"]
    assert [row[:26].strip() for row in rows] == list(read_run(run).scores)
    assert caption.startswith("2 pictures of 2 prompts, one training, one seed:")
    assert '"qwe"' in caption


def test_lpips_brings_div_and_no_folder_of_this_machine_is_recorded(run: Path) -> None:
    """Judges from folders, as a user has them: the playground's, and AlexNet with random weights."""
    folders = {name: shutil.copytree(playground.judge_folder("playground", name), run.parent / "judges" / f"my-{name}")
               for name in ("dino", "clip")}  # fmt: skip
    rng = torch.Generator().manual_seed(2)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    trunk = {f"features.{n}.weight": torch.randn(c, b, s, s, generator=rng) / s for n, (c, b, s) in shapes.items()}
    trunk |= {f"features.{n}.bias": torch.randn(c, generator=rng) for n, (c, _, _) in shapes.items()}
    torch.save(trunk, run.parent / "judges" / "alexnet.pth")
    given = load_judges(
        str(folders["dino"]), str(folders["clip"]), str(run.parent / "judges" / "alexnet.pth"), lpips_size=64
    )
    files = {"a red qwe robot": ("00.png", "01.png", "02.png"), "a qwe robot": ("03.png", "04.png")}
    entries = [{"file": f, "prompt": p, "seed": n} for p, named in files.items() for n, f in enumerate(named)]
    (run / "samples" / "prompts.json").write_text(json.dumps(entries))
    for step in (0, 100):
        for number, entry in enumerate(entries):
            draw(random_scene(step, number)).image.save(run / "samples" / f"step-{step:06d}" / str(entry["file"]))
    scores = score_run(run, given, "qwe")
    assert list(scores)[-2:] == ["LPIPS", "DIV"]
    assert given.lpips is not None
    for column, step in (("base", 0), ("finetuned", 100)):
        spread = []
        for named in files.values():
            paths = [run / "samples" / f"step-{step:06d}" / name for name in named]
            pairs = [given.lpips.among(list(pair)) or 0.0 for pair in combinations(paths, 2)]
            spread.append(sum(pairs) / len(pairs))
        assert scores["DIV"][column] == pytest.approx(sum(spread) / 2, rel=1e-4)
    judging = read_run(run).judging
    assert judging is not None
    models = {name: facts["model"] for name, facts in judging.judges.items() if name != "libraries"}
    assert models == {"dino": "my-dino", "clip": "my-clip", "lpips": "LPIPS alex (alexnet.pth)"}
    assert judging.judges["dino"]["weights"] == given.dino.identity["weights"]
    assert judging.images == {"base": 5, "finetuned": 5, "references": 2}
    for name in ("scores.json", "README.md"):
        assert str(run.parent) not in (run / name).read_text()


def test_the_path_of_the_first_version_is_the_same_program() -> None:
    from ether_diffusion.training import scores as old

    assert (old.main, old.score_run) == (scores_program.main, scores_program.score_run)
