"""Edges as control: canny, pixel by pixel, and the soft edges of a detector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ether_diffusion.control.conditions import CANNY_HIGH, CANNY_LOW, canny
from ether_diffusion.metrics.backbones import Picture, as_rgb
from ether_diffusion.metrics.control_tasks.base import Compared, Condition, MeanTask, Measure, read_grey, size_of
from ether_diffusion.metrics.edges import EdgeDetector, edge_agreement, ms_ssim
from ether_diffusion.metrics.names import SCALES

_BETWEEN = 0.1
"""So great a share of canny's pixels may be neither black nor white."""


class Canny(MeanTask):
    """Canny edges, pixel by pixel.

    Args:
        low: of canny's thresholds, 100 as ControlNet has it.
        high: likewise, 200.
        resize: see :class:`ControlTask`.
    """

    name = "canny"
    measures = (Measure("f1", "F1"), Measure("iou", "IoU"))
    filter = Image.Resampling.NEAREST

    def __init__(self, low: float = CANNY_LOW, high: float = CANNY_HIGH, resize: bool = False) -> None:
        super().__init__(resize)
        self.low, self.high = low, high

    @property
    def choices(self) -> dict[str, Any]:
        """The thresholds, too."""
        return {"edges": "OpenCV's Canny on RGB", "thresholds": [self.low, self.high], **super().choices}

    def _see(self, pictures: Sequence[Picture]) -> Iterator[NDArray[np.uint8]]:
        return (np.asarray(canny(as_rgb(picture), self.low, self.high).convert("L")) for picture in pictures)

    def _read(self, condition: Condition) -> NDArray[Any]:
        values = read_grey(condition)
        between = float(((values > 64) & (values < 192)).mean())
        if between > _BETWEEN or (values.any() and values.max() <= 127):
            raise ValueError(
                f"the condition is no picture of white edges on black: its values go from {values.min()} to "
                f"{values.max()}, {between:.0%} of them grey; --from_originals draws edges in the originals instead"
            )
        return values

    def _compare(self, seen: Any, reference: Any) -> Compared:
        return self._row({**edge_agreement(seen > 127, reference > 127)})


class SoftEdges(MeanTask):
    """Soft edges of a detector: HED, line art.

    Args:
        detector: draws the edges of a picture.
        source: what it is, in words.
        scales: of MS-SSIM.
        resize: see :class:`ControlTask`.
    """

    name = "edges"
    measures = (Measure("ms_ssim", "MS-SSIM"),)
    filter = Image.Resampling.BILINEAR

    def __init__(self, detector: EdgeDetector, source: str, scales: int = SCALES, resize: bool = False) -> None:
        super().__init__(resize)
        self.detector, self.source, self.scales = detector, source, scales

    @property
    def choices(self) -> dict[str, Any]:
        """The detector, too."""
        return {"edges": self.source, "scales of MS-SSIM": self.scales, **super().choices}

    def _see(self, pictures: Sequence[Picture]) -> Iterator[NDArray[np.uint8]]:
        for picture in pictures:
            edges, size = self.detector(picture).convert("L"), size_of(picture)
            yield np.asarray(edges if edges.size == size else edges.resize(size, self.filter))

    def _compare(self, seen: Any, reference: Any) -> Compared:
        return self._row({"ms_ssim": ms_ssim(seen, reference, self.scales)})
