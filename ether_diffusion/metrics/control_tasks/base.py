"""What all kinds of control share: an original with its condition, and how generated pictures are held against it.

The condition of a picture is its file where there is one; else the judge sees the original as it sees the pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ether_diffusion.images import load_image
from ether_diffusion.metrics.backbones import Picture, as_rgb

Condition = Path | Image.Image | NDArray[Any]
"""A file, or what is in it: class ids (H, W) for maps, else a grey picture."""
Row = dict[str, Any]
Size = tuple[int, int]
"""Width and height."""
_GREY = 16
"""Channels of a grey picture may differ by so much, as JPEG leaves them."""


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
