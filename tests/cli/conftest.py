"""Fixtures of the command's tests: the flags of two small trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from training.helpers import QUIET, draw_photo

from ether_diffusion.private import forget_accelerator

Flags = Callable[[Path], list[str]]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings in globals; without this the first run's would hold for all."""
    forget_accelerator()
    yield
    forget_accelerator()


@pytest.fixture
def subject_flags(base_folder: Path, tmp_path: Path) -> Flags:
    """The command line of a small DreamBooth run in the given folder."""
    for shade in range(2):
        draw_photo(tmp_path / "photos" / f"{shade}.png", shade)
    values = QUIET | {"pretrained_model_name_or_path": base_folder, "instance_data_dir": tmp_path / "photos"}
    return lambda folder: [*(f"--{name}={value}" for name, value in values.items()), f"--output_dir={folder}"]


@pytest.fixture
def control_flags(base_folder: Path) -> Flags:
    """The command line of a small training of a control in the given folder."""
    values = {
        "pretrained_model_name_or_path": base_folder,
        "train_data_dir": "playground",
        "max_train_steps": 2,
        "num_validation_images": 0,
        "resolution": 32,
    }
    return lambda folder: [*(f"--{name}={value}" for name, value in values.items()), f"--output_dir={folder}"]
