"""Semantic maps as control: a segmenter's classes in a picture against those of its map."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ether_diffusion.control.conditions import MAP_PALETTE, colour_map, load_map
from ether_diffusion.metrics.backbones import Picture
from ether_diffusion.metrics.control_tasks.base import Compared, Condition, ControlTask, Measure, Row
from ether_diffusion.metrics.segmentation import (
    MapIds,
    Segmenter,
    class_table,
    map_confusion,
    segmentation_scores,
)


class Segmentation(ControlTask):
    """Semantic maps: the segmenter's classes in the picture against those of the map.

    Args:
        segmenter: sees the pictures.
        label_offset: the map's id of the segmenter's class 0; None for the segmenter's own.
        ignore_index: an id that is left out; None for none.
        resize: see :class:`ControlTask`; maps are resized to the nearest pixel.
    """

    name = "segmentation"
    measures = (Measure("miou", "mIoU"), Measure("macc", "mAcc"), Measure("aacc", "aAcc"))
    filter = Image.Resampling.NEAREST

    def __init__(
        self,
        segmenter: Segmenter,
        label_offset: int | None = None,
        ignore_index: int | None = 255,
        resize: bool = False,
    ) -> None:
        super().__init__(resize)
        self.segmenter = segmenter
        offset = segmenter.label_offset if label_offset is None else label_offset
        self.labels = MapIds(len(segmenter.names), offset, ignore_index)

    @property
    def judges(self) -> dict[str, dict[str, str]]:
        """The segmenter."""
        return {"segmenter": self.segmenter.identity}

    @property
    def choices(self) -> dict[str, Any]:
        """What stands for which class, too."""
        labels = {"classes": self.labels.classes, "label offset": self.labels.offset}
        return {**labels, "ignore index": self.labels.ignore_index, **super().choices}

    def _see(self, pictures: Sequence[Picture]) -> Iterator[NDArray[np.int64]]:
        """What a map of the picture would say: ids, not classes."""
        return (classes + self.labels.offset for classes in self.segmenter.maps(pictures))

    def _portrait(self, seen: Any) -> Image.Image:
        return colour_map(seen % len(MAP_PALETTE))

    def _read(self, condition: Condition) -> NDArray[Any]:
        if isinstance(condition, Path):
            return load_map(condition)
        ids = np.asarray(condition)
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(f"a map is class ids (H, W), not {ids.dtype} of shape {ids.shape}")
        return ids

    def _compare(self, seen: Any, reference: Any) -> Compared:
        matrix = map_confusion(seen - self.labels.offset, reference, self.labels)
        row: Row = {name: None if math.isnan(value) else value for name, value in segmentation_scores(matrix).items()}
        return Compared(row | {"left_out": 1 - matrix.sum().item() / reference.size}, matrix)

    def scores(self, total: Tensor) -> dict[str, float]:
        """Of the one confusion matrix."""
        return segmentation_scores(total)

    def details(self, total: Tensor) -> list[dict[str, Any]]:
        """The classes."""
        return class_table(total, self.segmenter.names)
