"""One build: what it makes, from which seed, where its work lies; and what all stages take from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ether_diffusion.data.randomness import generator
from ether_diffusion.playground.build.presets import BASES, Preset


@dataclass(frozen=True)
class Project:
    """A build.

    Attributes:
        work: folder of drawings, checkpoints and finished stages.
        preset: sizes and durations.
        seed: of every weight, drawing and batch.
        device: where to train.
        start: a finished build whose weights the stages start from, instead of random ones.
        beside: a finished build of the unet, whose autoencoder, text tower and judges a flow transformer takes; None
            where the unet is built.
    """

    work: Path
    preset: Preset
    seed: int
    device: torch.device
    start: Path | None = None
    beside: Path | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """What is trained, in order."""
        return BASES["flow" if self.beside else "unet"]

    @property
    def drawings(self) -> Path:
        """Folder of the drawn training pool."""
        return self.work / "drawings"

    def model(self, stage: str) -> Path:
        """Folder of a finished stage's model."""
        return self.work / stage / "model"

    def latents(self, stage: str) -> Path:
        """What a stage that learns from latents keeps until it is finished."""
        return self.work / stage / "latents.safetensors"

    @contextmanager
    def seeded(self, stage: str) -> Iterator[None]:
        """Initial weights inside are a pure function of seed and stage; the global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.seed, "weights", stage).initial_seed())
            yield
