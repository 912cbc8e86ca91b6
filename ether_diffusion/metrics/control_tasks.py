"""What a control can be, and how a generated picture is held against it: maps, canny, soft edges, depth, landmarks.

The condition of a picture is its file where there is one; else the judge sees the original as it sees the pictures.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ether_diffusion.data.conditions import CANNY_HIGH, CANNY_LOW, MAP_PALETTE, canny, colour_map, load_map
from ether_diffusion.data.images import load_image
from ether_diffusion.metrics.backbones import Picture, as_rgb
from ether_diffusion.metrics.depth import DepthEstimator, depth_rmse
from ether_diffusion.metrics.edges import SCALES, EdgeDetector, edge_agreement, ms_ssim
from ether_diffusion.metrics.landmarks import LandmarkDetector, landmark_distance
from ether_diffusion.metrics.segmentation import (
    MapIds,
    Segmenter,
    class_table,
    map_confusion,
    segmentation_scores,
)

Condition = Path | Image.Image | NDArray[Any]
"""A file, or what is in it: class ids (H, W) for maps, else a grey picture."""
Row = dict[str, Any]
Size = tuple[int, int]
"""Width and height."""
_GREY = 16
"""Channels of a grey picture may differ by so much, as JPEG leaves them."""
_BETWEEN = 0.1
"""So great a share of canny's pixels may be neither black nor white."""


@dataclass(frozen=True)
class Pair:
    """An original with its condition.

    Attributes:
        name: what it is called, such as its path in the data's folder.
        original: the picture.
        condition: what generation was controlled by; None to compute it from the original.
        prompt: of the generated pictures.
    """

    name: str
    original: Picture
    condition: Condition | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Measure:
    """One figure of a task."""

    key: str
    title: str
    higher_is_better: bool = True


class Compared(NamedTuple):
    """A picture held against its condition: its own figures, and what it adds to the dataset's."""

    row: Row
    statistic: Tensor


class ControlTask(ABC):
    """A kind of control. Statistics of pictures add up, and the scores of any set are those of its sum.

    Args:
        resize: whether a condition or original of another size than the picture is brought to the picture's.

    Attributes:
        name: of the task.
        measures: its figures, the first of which tells good pictures from bad ones.
        filter: how conditions from files are resized.
    """

    name: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    filter: ClassVar[Image.Resampling]

    def __init__(self, resize: bool = False) -> None:
        self.resize = resize

    @property
    def judges(self) -> dict[str, dict[str, str]]:
        """The models that look at pictures, each with its weights and preprocessing."""
        return {}

    @property
    def choices(self) -> dict[str, Any]:
        """All else that the figures depend on."""
        how = f"conditions {self.filter.name.lower()}, originals lanczos" if self.resize else "refused"
        return {"size": "every picture at its own", "other sizes": how}

    def compare(self, pairs: Sequence[Pair], pictures: Sequence[Sequence[Picture]]) -> list[list[Compared]]:
        """Every picture of every pair, held against the pair's condition.

        Raises:
            ValueError: a condition is of another size than its picture and ``resize`` is off, or is not what it should
                be; the message names the pair.
            UnreadableImageError: a file cannot be read.
        """
        sizes = [[size_of(picture) for picture in of_pair] for of_pair in pictures]
        wanted = dict.fromkeys((number, size) for number, of_pair in enumerate(sizes) for size in of_pair)
        known = dict(zip(wanted, self._references([(pairs[number], size) for number, size in wanted]), strict=True))
        seen = iter(self._see([picture for of_pair in pictures for picture in of_pair]))
        return [
            [self._named(pair, next(seen), known[number, size]) for size in of_pair]
            for number, (pair, of_pair) in enumerate(zip(pairs, sizes, strict=True))
        ]

    def looks(self, pair: Pair, pictures: Sequence[Picture]) -> tuple[Image.Image | None, list[Image.Image | None]]:
        """The condition, and what the judge sees in the pictures, to be shown; None where that is no picture."""
        (reference,) = self._references([(pair, size_of(pictures[0]))])
        seen = [self._portrait(each) for each in self._see(pictures)]
        return self._portrait(reference), seen

    def _portrait(self, seen: Any) -> Image.Image | None:
        return Image.fromarray(seen.astype(np.uint8))

    def _named(self, pair: Pair, seen: Any, reference: Any) -> Compared:
        try:
            return self._compare(seen, reference)
        except ValueError as error:
            raise ValueError(f"{pair.name}: {error}") from error

    def _references(self, wanted: list[tuple[Pair, Size]]) -> list[Any]:
        """What the pictures should show: from files, else by a look at the originals."""
        computed = [self._original(pair, size) for pair, size in wanted if not self.from_file(pair)]
        looks = iter(self._see(computed))
        return [self._fitting(pair, size) if self.from_file(pair) else next(looks) for pair, size in wanted]

    def from_file(self, pair: Pair) -> bool:
        """Whether the pair's condition is given; else it is computed from the original."""
        return pair.condition is not None

    def _original(self, pair: Pair, size: Size) -> Image.Image:
        original = as_rgb(pair.original)
        self._check_size(pair.name, "original", original.size, size)
        return original if original.size == size else original.resize(size, Image.Resampling.LANCZOS)

    def _fitting(self, pair: Pair, size: Size) -> NDArray[Any]:
        assert pair.condition is not None
        try:
            values = self._read(pair.condition)
        except ValueError as error:
            raise ValueError(f"{pair.name}: {error}") from error
        height, width = values.shape
        self._check_size(pair.name, "condition", (width, height), size)
        return values if (width, height) == size else _resized(values, size, self.filter)

    def _check_size(self, name: str, what: str, found: Size, size: Size) -> None:
        if found != size and not self.resize:
            raise ValueError(
                f"{name}: the {what} has {found[0]} x {found[1]} pixels, the generated picture {size[0]} x {size[1]}; "
                f"--resize brings the {what} to the picture's size"
            )

    @abstractmethod
    def _see(self, pictures: Sequence[Picture]) -> Iterable[Any]:
        """What the judge sees in each picture."""

    def _read(self, condition: Condition) -> NDArray[Any]:
        """The condition's values, (H, W)."""
        return read_grey(condition)

    @abstractmethod
    def _compare(self, seen: Any, reference: Any) -> Compared: ...

    @abstractmethod
    def scores(self, total: Tensor) -> dict[str, float]:
        """The figures of pictures whose statistics add up to ``total``; NaN where there is nothing to take one of."""

    def details(self, total: Tensor) -> list[dict[str, Any]]:
        """Rows that tell where the figures come from, such as classes."""
        return []


class MeanTask(ControlTask):
    """A task whose figures are means over pictures: the statistic is 1 and the picture's figures."""

    def scores(self, total: Tensor) -> dict[str, float]:
        """The means."""
        return {m.key: (total[i] / total[0]).item() for i, m in enumerate(self.measures, 1)}

    def _row(self, row: Row) -> Compared:
        return Compared(row, torch.tensor([1, *(row[m.key] for m in self.measures)], dtype=torch.float64))


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


def size_of(picture: Picture) -> Size:
    """Width and height of a picture, upright."""
    return (load_image(picture) if isinstance(picture, Path) else picture).size


def read_grey(condition: Condition) -> NDArray[np.uint8]:
    """A grey picture's values, (H, W) of 8 bits.

    Raises:
        UnreadableImageError: the file cannot be read.
        ValueError: it has colours, or is no picture.
    """
    if isinstance(condition, np.ndarray):
        if condition.ndim != 2 or condition.dtype != np.uint8:
            raise ValueError(f"a condition is a grey picture of 8 bits, not {condition.dtype} of {condition.shape}")
        return condition
    values = np.asarray(as_rgb(condition)).astype(np.int16)
    if (np.ptp(values, axis=2) > _GREY).any():
        raise ValueError(
            "the condition has colours; edges and depth are grey pictures. --from_originals computes them instead"
        )
    return np.asarray(as_rgb(condition).convert("L"))


def _resized(values: NDArray[Any], size: Size, how: Image.Resampling) -> NDArray[Any]:
    if how == Image.Resampling.NEAREST:
        return np.asarray(Image.fromarray(values.astype(np.int32)).resize(size, how))
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, how)).round().astype(values.dtype)
