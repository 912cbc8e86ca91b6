"""Scores of a run's samples: which images are compared with which, and where the numbers go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from ether_diffusion.metrics.backbones import Picture, as_rgb
from ether_diffusion.metrics.scoring import Judges
from ether_diffusion.training.scores import NothingToScoreError, main, score_run

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


class Colours:
    """A judge whose feature of a one-coloured image is that colour, and of a prompt the colour it names."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def image_features(self, images: Sequence[Picture], show: str | None = None) -> Tensor:
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


def test_the_base_and_the_last_samples_are_scored(run: Path) -> None:
    scores = score_run(run, judges())
    similarity = {"base": 0.0, "finetuned": 0.5, "references": 1.0}
    assert scores == {"DINO": similarity, "CLIP-I": similarity, "CLIP-T": {"base": 0.5, "finetuned": 1.0}}
    assert json.loads((run / "scores.json").read_text()) == scores
    assert "CLIP-I" in (run / "report.html").read_text()
    assert "CLIP-I" in (run / "README.md").read_text()
    assert "playground.load()" in (run / "README.md").read_text()


def test_prompts_are_read_without_the_token_and_as_written(run: Path) -> None:
    clip = Colours()
    scores = score_run(run, judges(clip), token="qwe")
    assert list(scores) == ["DINO", "CLIP-I", "CLIP-T", "CLIP-T, prompt as written"]
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
