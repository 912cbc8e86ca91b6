"""Depth as control: an estimator's map of a picture against its condition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ether_diffusion.metrics.backbones import Picture
from ether_diffusion.metrics.control_tasks.base import Compared, MeanTask, Measure
from ether_diffusion.metrics.depth import DepthEstimator, depth_rmse


class Depth(MeanTask):
    """Depth on 0 to 255, every map of the estimator stretched to that range by itself.

    Args:
        estimator: sees the pictures.
        resize: see :class:`ControlTask`.
    """

    name = "depth"
    measures = (Measure("rmse", "RMSE", higher_is_better=False),)
    filter = Image.Resampling.BILINEAR

    def __init__(self, estimator: DepthEstimator, resize: bool = False) -> None:
        super().__init__(resize)
        self.estimator = estimator

    @property
    def judges(self) -> dict[str, dict[str, str]]:
        """The estimator."""
        return {"depth": self.estimator.identity}

    @property
    def choices(self) -> dict[str, Any]:
        """The scaling, too."""
        scaling = "the estimator's: each map's own minimum to 0, maximum to 255; files: as they are"
        return {"scaling": scaling, **super().choices}

    def _see(self, pictures: Sequence[Picture]) -> Iterator[NDArray[np.float32]]:
        return self.estimator.maps(pictures)

    def _compare(self, seen: Any, reference: Any) -> Compared:
        return self._row({"rmse": depth_rmse(seen, reference)})
