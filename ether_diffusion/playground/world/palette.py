"""The eight named colours of the world."""

from __future__ import annotations

import random

RGB = tuple[int, int, int]

PALETTE: dict[str, RGB] = {
    "red": (214, 46, 48),
    "orange": (244, 142, 36),
    "yellow": (250, 218, 62),
    "green": (48, 150, 72),
    "blue": (44, 98, 216),
    "purple": (126, 58, 176),
    "pink": (248, 136, 190),
    "white": (245, 245, 240),
}
"""Name to 8-bit sRGB."""

COLOURS = tuple(PALETTE)
INK: RGB = (38, 34, 52)
"""The colour of outlines and pupils."""


def mix(first: RGB, second: RGB, share: float) -> RGB:
    """``first`` with ``share`` (0 to 1) of ``second``."""
    r, g, b = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return r, g, b


def jitter(colour: RGB, dice: random.Random, amount: int = 8) -> RGB:
    """``colour`` with every channel moved by up to ``amount`` levels, as another light would."""
    r, g, b = (min(255, max(0, channel + dice.randint(-amount, amount))) for channel in colour)
    return r, g, b
