"""How an object is dressed: its colours, the pattern of its coat, what it wears."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ether_diffusion.playground.world.palette import COLOURS
from ether_diffusion.playground.world.shapes import Polygon, ellipse, place, rectangle

PATTERNS = ("plain", "striped", "dotted", "two-tone")
ANGLES = (0, 45, 90)
"""Degrees by which stripes, or the line between two tones, are turned; 0 is horizontal."""
GARMENTS = ("hat", "antenna", "scarf")
"""Parts that have the accent colour; a hat and an antenna exclude each other."""
PARTS = (*GARMENTS, "face")


@dataclass(frozen=True)
class Look:
    """The dress of an object, free of its class, place and size.

    Attributes:
        colour: name of the coat's colour.
        pattern: one of ``PATTERNS``; every pattern but ``"plain"`` needs ``second``.
        second: name of the pattern's other colour: the stripes, the dots, the lower tone.
        angle: one of ``ANGLES``; only for stripes and two tones.
        parts: which of ``PARTS`` were added.
        accent: name of the colour of the added garments.

    Raises:
        ValueError: the attributes contradict each other.
    """

    colour: str
    pattern: str = "plain"
    second: str | None = None
    angle: int = 0
    parts: tuple[str, ...] = ()
    accent: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in (self.colour, self.second, self.accent) if name not in (*COLOURS, None)]
        if unknown or self.colour is None:
            raise ValueError(f"no such colour: {unknown}; the palette has {', '.join(COLOURS)}")
        if self.pattern not in PATTERNS or self.angle not in ANGLES:
            raise ValueError(f"a pattern is one of {PATTERNS} at one of {ANGLES} degrees: {self.pattern}, {self.angle}")
        if (self.second is None) != (self.pattern == "plain") or self.second == self.colour:
            raise ValueError(f"{self.pattern} in {self.colour} and {self.second}: a pattern has two colours, plain one")
        if not set(self.parts) <= set(PARTS) or {"hat", "antenna"} <= set(self.parts):
            raise ValueError(f"parts are among {PARTS}, either a hat or an antenna: {self.parts}")
        if (self.accent is not None) != bool(self.garments):
            raise ValueError(f"accent colours {GARMENTS}: give it with one of these and only then: {self}")

    @property
    def garments(self) -> tuple[str, ...]:
        """The added parts that have the accent colour."""
        return tuple(part for part in self.parts if part in GARMENTS)

    @property
    def coat(self) -> frozenset[str]:
        """The names of the coat's one or two colours."""
        return frozenset(name for name in (self.colour, self.second) if name)


def marks(pattern: str, angle: int) -> tuple[Polygon, ...]:
    """The polygons of a pattern's second colour, over the unit square [-1, 1]² and somewhat beyond."""
    if pattern == "striped":
        bands = (rectangle(-1.6, y / 100, 1.6, y / 100 + 0.22) for y in range(-155, 160, 44))
        return tuple(place(band, (0, 0), 1, angle) for band in bands)
    if pattern == "dotted":
        step, rise = 0.48, 0.48 * math.sqrt(3) / 2
        rows, columns = range(-4, 5), range(-4, 5)
        return tuple(ellipse((x + y % 2 / 2) * step, y * rise, 0.14, corners=14) for y in rows for x in columns)
    if pattern == "two-tone":
        return (place(rectangle(-2, 0.05, 2, 2), (0, 0), 1, -angle),)
    return ()
