"""Every test runs without the Hub, on small real models built in memory or in a temporary folder.

They run on the CPU wherever they are, for many compare bit for bit, but for those marked ``gpu`` (``make test-gpu``).
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.update({} if os.environ.get("ETHER_TEST_GPU") else {"CUDA_VISIBLE_DEVICES": ""})

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from page.chromium import open_page

from ether_diffusion.logs import PACKAGE, TRAINING, Console
from ether_diffusion.playground.tiny import tiny_pipeline

__all__ = ["open_page"]
"""Of these fixtures that of pages in a browser comes from elsewhere."""

ON_GPU = bool(os.environ.get("ETHER_TEST_GPU"))
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell starts the tests in the background
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, where there is none or it is not asked for."""
    if ON_GPU and torch.cuda.is_available():
        return
    reason = "there is no CUDA device" if ON_GPU else "needs a CUDA device: make test-gpu"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def console_as_before() -> Iterator[None]:
    """A program that a test runs in this process prints its messages; it does not go on in the tests after it."""
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in (PACKAGE, TRAINING)]
    handlers, levels = [each for each in root.handlers if isinstance(each, Console)], [each.level for each in loggers]
    yield
    for each in [each for each in root.handlers if isinstance(each, Console) and each not in handlers]:
        root.removeHandler(each)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


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
