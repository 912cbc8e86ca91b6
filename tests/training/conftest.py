"""Fixtures of the training tests: photos, and runs in this process on the tiny models."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from training.helpers import QUIET, SMALL, draw_photo

from ether_diffusion.private import forget_accelerator
from ether_diffusion.training import dreambooth
from ether_diffusion.training import program as training_program
from ether_diffusion.training.dreambooth_config import DreamBoothConfig


def _forget_accelerate() -> None:
    forget_accelerator()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings in globals; without this the first run's would hold for all."""
    _forget_accelerate()
    yield
    _forget_accelerate()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three square photos of the training size: nothing random precedes their latents, so these are cached."""
    folder = tmp_path_factory.mktemp("photos") / "dog"
    for shade in range(3):
        draw_photo(folder / f"{shade}.png", shade)
    return folder


@pytest.fixture(scope="session")
def wide_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of several shapes, which a random crop cuts anew every time."""
    folder = tmp_path_factory.mktemp("photos") / "wide"
    for shade, size in enumerate([(120, 80), (80, 120), (96, 96), (100, 80)]):
        draw_photo(folder / f"{shade}.png", shade, size)
    return folder


@pytest.fixture
def settings(tmp_path: Path, base_folder: Path, photos: Path) -> Callable[..., DreamBoothConfig]:
    """``settings("name", method="ether")``: a config of a small run in the folder ``name``, without samples."""

    def make(name: str = "run", **changes: Any) -> DreamBoothConfig:
        values = QUIET | {
            "pretrained_model_name_or_path": str(base_folder),
            "output_dir": tmp_path / name,
            "instance_data_dir": photos,
        }
        return DreamBoothConfig(**values | changes)

    return make


@pytest.fixture
def train(settings: Callable[..., DreamBoothConfig]) -> Callable[..., Path]:
    """Train as ``settings`` says, in this process, and return the run folder."""

    def run(name: str = "run", **changes: Any) -> Path:
        _forget_accelerate()
        config = settings(name, **changes)
        dreambooth.run(config)
        return config.output_dir

    return run


@pytest.fixture
def train_with_samples(train: Callable[..., Path]) -> Callable[..., Path]:
    """The same at the model's own size, with one sample at the first and last step."""

    def run(name: str = "run", **changes: Any) -> Path:
        return train(name, **SMALL | {"resolution": None} | changes)

    return run


@pytest.fixture
def pipes(monkeypatch: pytest.MonkeyPatch) -> list[DiffusionPipeline]:
    """The pipelines that runs of this test load, as they train them."""
    loaded: list[DiffusionPipeline] = []
    original = training_program.load_base

    def load(*arguments: Any) -> DiffusionPipeline:
        loaded.append(original(*arguments))
        return loaded[-1]

    monkeypatch.setattr(training_program, "load_base", load)
    return loaded


@pytest.fixture
def flags(base_folder: Path, photos: Path) -> Callable[..., list[str]]:
    """The command line of a small run in ``folder``."""

    def make(folder: Path, **changes: Any) -> list[str]:
        values = QUIET | {
            "pretrained_model_name_or_path": base_folder,
            "output_dir": folder,
            "instance_data_dir": photos,
        }
        return [f"--{name}={value}" for name, value in (values | changes).items()]

    return make


@pytest.fixture(scope="session")
def program() -> list[str]:
    """The command that starts the training program in another process."""
    return [sys.executable, str(Path(__file__).parents[2] / "train_dreambooth.py")]


@pytest.fixture(scope="session")
def one_thread() -> dict[str, str]:
    """The environment of other processes, which then compute bit for bit what this one does."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
