"""What studies on one base share: the base itself, and what it is known by."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from diffusers import DiffusionPipeline

from ether_diffusion.evaluation.runner import Study, Subject
from ether_diffusion.pipelines import fingerprint
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.drawing import load_pipeline


class HasBase(Protocol):
    """Settings of a study that name a base."""

    @property
    def base(self) -> Base:
        """The base model of all arms."""


class StudyOnBase(Study[Subject]):
    """A study whose arms are all on one base.

    Attributes:
        config: its settings.
        device: where to draw.
    """

    config: HasBase
    device: torch.device

    @cached_property
    def base(self) -> DiffusionPipeline:
        """The base model itself, loaded when it is first needed."""
        return load_pipeline(self.config.base, self.device)

    @cached_property
    def base_hashes(self) -> dict[str, str | None]:
        """The identity of the base, by component."""
        return fingerprint.base_hashes(self.base)
