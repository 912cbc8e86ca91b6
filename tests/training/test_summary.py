"""What a training says before it begins, compared with what it then does."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.helpers import draw_photo, provenance

from ether_diffusion.training import control
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.program import logger as of_program

Train = Callable[..., Path]


@pytest.fixture
def summary(caplog: pytest.LogCaptureFixture) -> Callable[[], dict[str, str]]:
    """The summary of the last training: its rows, and its title under the empty key."""
    caplog.set_level(logging.INFO, "ether_diffusion")

    def rows() -> dict[str, str]:
        (text,) = (r.getMessage() for r in caplog.records if r.name == of_program.name and r.msg == "%s")
        caplog.clear()
        title, *lines = text.splitlines()
        return {"": title, **{line.split()[0]: re.sub(r"^ +\w+ +", "", line) for line in lines}}

    return rows


def test_a_subject(train: Train, base_folder: Path, tmp_path: Path, summary: Callable[[], dict[str, str]]) -> None:
    for number, size in enumerate([(64, 64), (48, 40), (28, 40)]):
        draw_photo(tmp_path / "own" / f"{number}.png", number, size)
    (tmp_path / "own" / "broken.jpg").write_text("none")
    run = train(instance_data_dir=tmp_path / "own", train_batch_size=2, max_train_steps=6, checkpointing_steps=4)
    rows = summary()
    assert rows.pop("device").startswith("cpu, ")
    count = provenance(run)["trained_parameters"]["unet"]
    times = provenance(run)["pictures_seen"]["instance"]
    assert (times["fewest"], times["most"]) == (4, 4)
    assert rows == {
        "": "training ETHER+",
        "base": f"{base_folder} (Stable Diffusion 1.x and 2.x)",
        "trained": f"{count:,} parameters of unet",
        "settings": "n_blocks 4, targets attention, initial_length 1, two_sided yes, learning rate 0.006, constant",
        "pictures": f"3 in {tmp_path / 'own'}, 32 x 32 pixels; 1 enlarged (2.png); 1 skipped (broken.jpg)",
        "steps": "6 of 2 pictures; each picture is shown 4 times",
        "samples": "none; a checkpoint every 4 steps",
        "time": "told after 5 steps, with the memory in use",
        "result": str(run),
    }


def test_several_sizes_text_encoder_prior_and_samples(
    train: Train, wide_photos: Path, summary: Callable[[], dict[str, str]]
) -> None:
    run = train(
        instance_data_dir=wide_photos,
        aspect_ratio_buckets=True,
        resolution=64,
        train_text_encoder=True,
        with_prior_preservation=True,
        class_prompt="a dog",
        num_class_images=3,
        num_validation_images=2,
        validation_steps=50,
        max_train_steps=1,
        learning_rate=0.5,
        lr_scheduler="cosine",
        method="ether",
    )
    rows = summary()
    counts = provenance(run)["trained_parameters"]
    assert rows["trained"] == f"{sum(counts.values()):,} parameters of unet, text_encoder"
    assert rows["settings"] == "n_blocks 4, targets attention, initial_length 1, learning rate 0.5, cosine"
    assert re.fullmatch(rf"4 in {wide_photos}, (\d+ x \d+, )+\d+ x \d+ pixels; 3 of the class", rows["pictures"])
    assert rows["samples"] == "2 every 50 steps; a checkpoint every 200"


def test_a_run_that_goes_on_says_where(train: Train, summary: Callable[[], dict[str, str]]) -> None:
    train(max_train_steps=2, checkpointing_steps=2)
    assert "going on" not in summary()["steps"]
    train(max_train_steps=4, checkpointing_steps=2, resume="latest")
    assert summary()["steps"].startswith("4 of 1 picture, going on from step-000002; each picture is shown ")


def test_several_subjects(train: Train, tmp_path: Path, summary: Callable[[], dict[str, str]]) -> None:
    for name, number in (("cat", 2), ("dog", 1)):
        for shade in range(number):
            draw_photo(tmp_path / "all" / name / f"{shade}.png", shade)
    run = train(instance_data_dir=Path(), subjects_dir=tmp_path / "all", instance_prompt="a {subject}")
    rows = summary()
    count = provenance(run / "cat")["trained_parameters"]["unet"]
    assert rows["trained"] == f"2 adapters, each {count:,} parameters of unet"
    assert rows["pictures"] == "3 in 2 folders, 32 x 32 pixels"
    assert rows["result"] == str(run)


def test_a_control(base_folder: Path, tmp_path: Path, summary: Callable[[], dict[str, str]]) -> None:
    values: dict[str, Any] = {"train_data_dir": "playground", "max_train_steps": 1, "num_validation_images": 0}
    values |= {"pretrained_model_name_or_path": str(base_folder), "resolution": 32, "output_dir": tmp_path / "run"}
    control.run(ControlConfig(**values))
    rows = summary()
    counts = provenance(tmp_path / "run")["trained_parameters"]
    assert rows["trained"] == f"{sum(counts.values()):,} parameters of {', '.join(counts)}"
    assert rows["pictures"] == "endless pairs with their conditions, 32 x 32 pixels"
    assert rows["steps"] == "1 of 1 picture"
