"""How a side of a projection is divided: one whole, or the parts of a fused Linear, side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INPUT_PARTS = ("attention", "mlp")
"""What a fused Linear may have side by side on its input."""
OUTPUT_PARTS = ("q", "k", "v", "mlp")
"""Likewise on its output."""


class Part(NamedTuple):
    """Neighbouring features of a side.

    Attributes:
        name: of :data:`INPUT_PARTS` or :data:`OUTPUT_PARTS`; "" of a whole side.
        start: the first feature.
        width: number of features.
    """

    name: str
    start: int
    width: int

    def key(self, vector: str) -> str:
        """The key of this part's own vectors."""
        return f"{vector}.{self.name}" if self.name else vector


@dataclass(frozen=True)
class Layout:
    """The parts of a side that are transformed, each by vectors of its own; features between them stay as they are.

    Attributes:
        features: of the whole side.
        parts: in their order.
    """

    features: int
    parts: tuple[Part, ...]

    @staticmethod
    def whole(features: int) -> Layout:
        """A side that is one."""
        return Layout(features, (Part("", 0, features),))

    @staticmethod
    def side_by_side(widths: Mapping[str, int]) -> Layout:
        """A fused side: the widths of its parts by name."""
        parts, start = [], 0
        for name, width in widths.items():
            parts.append(Part(name, start, width))
            start += width
        return Layout(start, tuple(parts))

    @staticmethod
    def of(side: Layout | int) -> Layout:
        """A layout, or that of a whole side with so many features."""
        return Layout.whole(side) if isinstance(side, int) else side

    def without(self, names: Collection[str]) -> Layout:
        """The same side, whose parts of these names stay as they are."""
        return Layout(self.features, tuple(part for part in self.parts if part.name not in names))

    def spread(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of every part (…, k, width), one below the other and each in its place: (…, Σ k, features)."""
        return torch.cat(self.place(rows), -2) if len(rows) > 1 else self.place(rows)[0]

    def place(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Values of every part (…, width) with zeros in all other features: (…, features)."""
        return [
            value if part.width == self.features else F.pad(value, (part.start, self._behind(part)))
            for part, value in zip(self.parts, values, strict=True)
        ]

    def _behind(self, part: Part) -> int:
        return self.features - part.start - part.width
