"""Landmarks of a face as control: where they are in a picture and where they were in its original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ether_diffusion.metrics.backbones import Picture, as_rgb
from ether_diffusion.metrics.control_tasks.base import Compared, ControlTask, Measure, Pair
from ether_diffusion.metrics.landmarks import LandmarkDetector, landmark_distance


class Landmarks(ControlTask):
    """Landmarks of a face, those of the original against the picture's; a condition's file is not looked at.

    A picture without a face where the original has one has *failed*; an original without one measures nothing.

    Args:
        detector: finds the points of a picture.
        source: what it is, in words.
        resize: see :class:`ControlTask`.
    """

    name = "landmarks"
    measures = (
        Measure("distance", "L2, pixels", higher_is_better=False),
        Measure("failed_share", "failed", higher_is_better=False),
        Measure("failed", "pictures without a face", higher_is_better=False),
        Measure("unmeasured", "originals without a face", higher_is_better=False),
    )
    filter = Image.Resampling.LANCZOS

    def __init__(self, detector: LandmarkDetector, source: str, resize: bool = False) -> None:
        super().__init__(resize)
        self.detector, self.source = detector, source

    @property
    def choices(self) -> dict[str, Any]:
        """The detector, too."""
        return {"landmarks": self.source, "of several faces": "the greatest", **super().choices}

    def from_file(self, pair: Pair) -> bool:
        """Never: a drawing of landmarks does not tell which is which."""
        return False

    def _portrait(self, seen: Any) -> None:
        return None

    def _see(self, pictures: Sequence[Picture]) -> Iterator[NDArray[np.floating] | None]:
        return (self.detector(as_rgb(picture)) for picture in pictures)

    def _compare(self, seen: Any, reference: Any) -> Compared:
        if reference is None:
            return Compared({"distance": None, "unmeasured": True}, torch.tensor([0.0, 0, 0, 1]).double())
        if seen is None:
            return Compared({"distance": None, "failed": True}, torch.tensor([0.0, 0, 1, 0]).double())
        distance = landmark_distance(seen, reference)
        return Compared({"distance": distance}, torch.tensor([1, distance, 0, 0], dtype=torch.float64))

    def scores(self, total: Tensor) -> dict[str, float]:
        """The mean distance where both have a face, and what has none."""
        measured, distance, failed, unmeasured = total.tolist()
        asked = measured + failed
        return {
            "distance": distance / measured if measured else math.nan,
            "failed_share": failed / asked if asked else math.nan,
            "failed": failed,
            "unmeasured": unmeasured,
        }
