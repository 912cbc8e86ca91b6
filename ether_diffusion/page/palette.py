"""One palette for all figures and pages: each method has its colour everywhere, for any colour vision."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ether_diffusion.registry import METHODS

LIGHT = ("#6b03ca", "#dd7823", "#174790", "#c27ab1", "#3aa169", "#95001a", "#9d7dff", "#6f3753", "#787878")
DARK = ("#925af9", "#c3680e", "#86afff", "#feadcc", "#68ff5d", "#ff2668", "#ffffc3", "#995599", "#98988e")
"""The colours on light and on dark paper, in the order of the methods in the registry; the last one is grey.

The first eight were searched for: the least distance between two of them, seen with any of four kinds of colour vision.
"""
THEME = {
    "paper": ("#fbfaf8", "#15161a"),
    "card": ("#ffffff", "#1d1f24"),
    "ink": ("#1c1d21", "#e9e8e4"),
    "soft": ("#66676e", "#a0a1a8"),
    "line": ("#e4e2dd", "#33353c"),
    "edge": ("#8b8c92", "#7a7c85"),
    "accent": ("#3a5bc7", "#8ea6ff"),
    "second": ("#b55017", "#f0a063"),
    "good": ("#2c7a4b", "#6fcf97"),
    "bad": ("#b3312c", "#ff8a80"),
}
"""The colours of pages on light and dark paper: paper and cards, text and quiet text, rules and the edges of fields,
links and what is active, and the states of a run: interrupted (second), finished (good), failed (bad)."""
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Style:
    """How a series is drawn.

    Attributes:
        number: of its colour in the palette.
        repeat: 0 for the first series of a figure with this colour, 1 for the next.
    """

    number: int
    repeat: int = 0

    @property
    def dashes(self) -> str:
        """Of its line: series of one colour differ in them."""
        return DASHES[self.repeat % len(DASHES)]

    @property
    def marker(self) -> str:
        """Of its points: each colour has its own, for those who see no colours."""
        return MARKERS[(self.number + self.repeat) % len(MARKERS)]


def styles(labels: Sequence[str], methods: Sequence[str] | None = None) -> dict[str, Style]:
    """A style for each label: a method's colour is the same in all figures, and several arms of it differ in dashes.

    Args:
        labels: of the series, such as ``ether_plus``, ``lora, 0.001``.
        methods: the method behind each label; by default the one that the label begins with, by name or title. A
            variant has the colour of the method that it changes. What is of no method has a colour that no method
            among the labels has, the grey first.
    """
    # what stands for many methods has no colour of its own: each takes a free one
    order = [name for name, entry in METHODS.items() if entry.variant_of is None and not entry.is_any_of_peft]
    given = [_method(label) for label in labels] if methods is None else list(methods)
    known = [METHODS[name].variant_of or name if name in METHODS else name for name in given]
    slots = [order.index(name) % len(LIGHT) if name in order else None for name in known]
    free = [number for number in reversed(range(len(LIGHT))) if number not in slots] or list(range(len(LIGHT)))
    others = [number for number, slot in enumerate(slots) if slot is None]
    chosen = {label: slot for label, slot in zip(labels, slots, strict=True) if slot is not None}
    chosen |= {labels[number]: free[place % len(free)] for place, number in enumerate(others)}
    used: Counter[int] = Counter()
    found = {}
    for label in dict.fromkeys(labels):
        found[label] = Style(chosen[label], used[chosen[label]])
        used[chosen[label]] += 1
    return found


def _method(label: str) -> str | None:
    """The method whose name or title a label begins with, the longest."""
    known = {written: name for name, entry in METHODS.items() for written in (name, entry.title)}
    fits = [written for written in known if re.match(rf"{re.escape(written)}(?![A-Za-z+])", label)]
    return known[max(fits, key=len)] if fits else None
