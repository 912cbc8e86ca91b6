"""A run with a new token, drawn, exported, compared and scored as a user would."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training.test_new_token import PROMPT, TOKEN, WITH

import ether_diffusion as ether
from ether_diffusion.cli import main
from ether_diffusion.runs.drawing import load_pipeline, load_run
from ether_diffusion.runs.rare_token import rare_token
from ether_diffusion.runs.record import read_run

Train = Callable[..., Path]
DRAWN: dict[str, Any] = {"num_validation_images": 1, "learning_rate": 0.3, "token_lr": 0.3, "resolution": None}


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.array(image)


def test_ether_sample_draws_with_the_token(train: Train, tmp_path: Path) -> None:
    run = train(**WITH | DRAWN)
    main(["sample", str(run), "--seeds", "0", "--output_dir", str(tmp_path / "pictures")])
    (picture,) = (tmp_path / "pictures").glob("00-seed0-*.png")
    sampled = pixels(run / "samples" / "step-000003" / "00.png")
    assert np.abs(pixels(picture).astype(int) - sampled.astype(int)).max() <= 1


def test_two_runs_with_one_token_are_not_drawn_together(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [train(name, **WITH) for name in ("one", "two")]
    with pytest.raises(SystemExit):
        main(["sample", *map(str, runs), "--prompts", PROMPT, "--output_dir", str(tmp_path / "pictures")])
    assert f"the adapter '0' has the token {TOKEN}, too: unload it, or choose" in capsys.readouterr().err


def test_export_says_that_the_embeddings_go_with_the_lora(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page draws both with the token: the LoRA in a pipeline of diffusers' own."""
    run = train(**WITH | DRAWN)
    page = tmp_path / "page.html"
    with caplog.at_level(logging.WARNING):
        main(["export", str(run), str(tmp_path / "lora.safetensors"), "--dtype", "float32", "--page", str(page)])
    beside = tmp_path / "lora.learned_embeds.safetensors"
    assert f"the new token {TOKEN} is no part of a LoRA: keep {beside} beside it" in caplog.text
    assert int(capsys.readouterr().out.splitlines()[-1].split("differ by ")[1].split()[0]) <= 1

    stock, mine = load_pipeline(read_run(run).source), load_run(run)
    stock.load_lora_weights(str(tmp_path / "lora.safetensors"))
    stock.load_textual_inversion(str(beside))
    assert ether.adapters(mine)["default"].placeholder_token == TOKEN


def test_the_token_is_the_rare_word_of_the_scores(train: Train) -> None:
    run = read_run(train(**WITH | {"num_validation_images": 1}))
    assert run.class_prompt is None
    assert rare_token(run) == TOKEN
