"""Fixtures of the families' tests: tiny bases on disk, and runs on them in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families.tiny import build
from training.conftest import fresh_accelerate, photos  # noqa: F401 - fixtures
from training.helpers import QUIET

from ether_diffusion.private import forget_accelerator
from ether_diffusion.training import dreambooth
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

RATE = 1e-2
"""Learning rate at which a tiny model with random weights learns something in twenty steps."""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``base("flux")``: the folder of that tiny pipeline."""
    folder = tmp_path_factory.mktemp("bases")

    def saved(name: str) -> Path:
        if not (folder / name).is_dir():
            build(name).save_pretrained(folder / name)
        return folder / name

    return saved


@pytest.fixture
def settings(base: Callable[[str], Path], photos: Path, tmp_path: Path) -> Callable[..., DreamBoothConfig]:  # noqa: F811
    """``settings("flux", "name", …)``: a config of a small run."""

    def make(family: str, name: str = "run", **changes: Any) -> DreamBoothConfig:
        values = QUIET | {
            "pretrained_model_name_or_path": str(base(family)),
            "output_dir": tmp_path / name,
            "instance_data_dir": photos,
            "learning_rate": RATE,
        }
        return DreamBoothConfig(**values | changes)

    return make


@pytest.fixture
def train(settings: Callable[..., DreamBoothConfig]) -> Callable[..., Path]:
    """Train as ``settings`` says, in this process, and return the run folder."""

    def run(family: str, name: str = "run", **changes: Any) -> Path:
        forget_accelerator()
        config = settings(family, name, **changes)
        dreambooth.run(config)
        return config.output_dir

    return run
