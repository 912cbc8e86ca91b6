"""The colours of methods: the same everywhere, seen on both papers and with any colour vision."""

from __future__ import annotations

import itertools
import math

import pytest

from ether_diffusion.page.palette import DARK, LIGHT, THEME, Style, styles
from ether_diffusion.registry import METHODS

VISIONS = {  # G. Machado et al., 2009, full severity; linear RGB to linear RGB
    "all colours": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
PAPERS = {"light": (LIGHT, "#ffffff"), "dark": (DARK, "#1d1f24")}


def linear(colour: str) -> tuple[float, ...]:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return tuple(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)


def luminance(colour: str) -> float:
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def lab(colour: str, vision: str) -> tuple[float, float, float]:
    """CIELAB under D65 of a colour as it is seen."""
    seen = [sum(m * part for m, part in zip(row, linear(colour), strict=True)) for row in VISIONS[vision]]
    red, green, blue = (min(1.0, max(0.0, part)) for part in seen)
    white = (
        (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505,
        0.2126 * red + 0.7152 * green + 0.0722 * blue,
        (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089,
    )
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in white)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("paper", PAPERS)
def test_lines_stand_out_from_the_paper(paper: str) -> None:
    colours, ground = PAPERS[paper]
    assert min(contrast(colour, ground) for colour in colours) >= 3  # WCAG 2.2, 1.4.11


@pytest.mark.parametrize("ground", ["paper", "card"])
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_edges_of_pages_reach_the_contrast_of_aa(theme: int, ground: str) -> None:
    colours = {name: both[theme] for name, both in THEME.items()}
    found = {name: contrast(colour, colours[ground]) for name, colour in colours.items()}
    text = ("ink", "soft", "accent", "second", "good", "bad")
    assert {name: found[name] for name in text if found[name] < 4.5} == {}  # WCAG 2.2, 1.4.3
    assert found["edge"] >= 3  # 1.4.11
    assert PAPERS["dark" if theme else "light"][1] == colours["card"]


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("paper", PAPERS)
def test_any_two_colours_differ_with_any_colour_vision(paper: str, vision: str) -> None:
    seen = [lab(colour, vision) for colour in PAPERS[paper][0]]
    assert min(math.dist(one, other) for one, other in itertools.combinations(seen[:8], 2)) > 29
    assert min(math.dist(seen[8], other) for other in seen[:8]) > 15  # the grey; 2.3 can be told apart side by side


def test_a_method_has_its_colour_whatever_stands_beside_it() -> None:
    alone = styles(["lora"])["lora"]
    assert styles(["base", "ether", "lora", "oft"])["lora"] == alone
    assert styles(["lora, 0.001"])["lora, 0.001"] == alone
    assert styles(["runs/dog"], ["lora"])["runs/dog"] == alone
    named = [name for name, entry in METHODS.items() if entry.variant_of is None and not entry.is_any_of_peft]
    assert named[len(LIGHT) :] == [], "each needs a colour of its own in LIGHT and in DARK of page/palette.py"
    assert len({style.number for style in styles(named).values()}) == len(named)
    outside = styles(["dora", "lora", "delora"], ["peft", "lora", "peft"])
    assert len({style.number for style in outside.values()}) == 3
    assert outside["lora"] == alone


def test_a_label_is_of_the_method_that_it_begins_with_and_not_of_a_shorter_one() -> None:
    assert styles(["ether_plus"])["ether_plus"] != styles(["ether"])["ether"]
    assert styles(["ether_plus one side"])["ether_plus one side"].number == styles(["ether_plus"])["ether_plus"].number
    for name, entry in METHODS.items():
        assert styles([f"{entry.title}: mIoU"])[f"{entry.title}: mIoU"] == styles([name])[name]
    pair = styles(["ether_plus", "ether_plus_free"])
    assert pair["ether_plus_free"] == Style(pair["ether_plus"].number, 1)
    assert styles(["etherial", "ether"])["etherial"].number != styles(["ether"])["ether"].number


def test_arms_of_one_method_differ_in_dashes_and_others_take_free_colours() -> None:
    found = styles(["lora r=4", "lora r=8", "base", "truth"])
    first, second, base, truth = found.values()
    assert first.number == second.number
    assert first.dashes != second.dashes
    assert first.marker != second.marker
    assert len({first.number, base.number, truth.number}) == 3
    assert Style(0, 4).dashes == Style(0).dashes
