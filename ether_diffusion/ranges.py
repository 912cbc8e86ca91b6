"""The ranges of numbers in settings: each is checked before anything else happens, and named in the help."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ether_diffusion.reading import shown

LARGEST = 2**63
"""Above every whole number that a setting may be: torch counts in 64 bits."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; NaN, infinity and integers from ``LARGEST`` on are in none.

    Attributes:
        low: the lowest; ``above`` leaves it out.
        high: the highest; ``below`` leaves it out.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        more = value > self.low if self.above else value >= self.low
        less = value < self.high if self.below else value <= self.high
        return more and less and (value < LARGEST if isinstance(value, int) else not math.isinf(value))

    def __str__(self) -> str:
        low, high = (str(int(end)) if end == round(end) else f"{end:g}" for end in (self.low, min(self.high, 1e300)))
        first = f"above {low}" if self.above else f"at least {low}"
        if math.isinf(self.high):
            return first
        return f"{first} and below {high}" if self.below else f"from {low} to {high}"

    def of(self, kind: Callable[[str], float]) -> Callable[[str], Any]:
        """The ``type`` of an argparse flag for such numbers, made by ``int`` or ``float``."""

        def convert(text: str) -> float:
            try:
                value = kind(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
            if value not in self:
                raise argparse.ArgumentTypeError(f"it must be {self}, not {_refused(value)}")
            return value

        return convert


def _refused(value: float) -> str:
    """A number for a message, and whether it is too large whatever the range."""
    return f"{shown(value)}, which is too large" if isinstance(value, int) and value >= LARGEST else shown(value)


COUNT = Range(1)
AMOUNT = Range(0)
POSITIVE = Range(0, above=True)
SHARE = Range(0, 1)
OFFSET = Range(-255, 255)
"""Of the ids of classes, which a picture holds in a byte."""
SEED = Range(0, 2**32 - 1)
"""What every random generator takes."""


def check_ranges(settings: object, ranges: Mapping[str, Range]) -> None:
    """Look at the numbers of some settings; None is none, and of a list every one counts.

    Raises:
        ValueError: one is out of its range.
    """
    for name, allowed in ranges.items():
        value = getattr(settings, name)
        for each in value if isinstance(value, list) else (value,):
            if each is not None and not isinstance(each, int | float):
                raise ValueError(f"{name} must be a number, {allowed}, not {each!r}")
            if each is not None and each not in allowed:
                raise ValueError(f"{name} must be {allowed}, not {_refused(each)}")
