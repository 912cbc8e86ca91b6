"""Every test runs without the Hub, on small real models built in memory or in a temporary folder."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from ether_diffusion.playground.tiny import tiny_pipeline

torch.set_num_threads(1)


@pytest.fixture
def pipe() -> DiffusionPipeline:
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny-sd"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny-sdxl"
    tiny_pipeline(xl=True).save_pretrained(folder)
    return folder
