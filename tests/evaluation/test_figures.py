"""Figures of several panels, and the rows of figures of differences."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ether_diffusion.evaluation.figures import Line, Panel, difference_of, write_figure
from ether_diffusion.evaluation.statistics import compare


def width_of(path: Path, panels: int) -> int:
    write_figure(path, [Panel("score", "rate", [Line("a", (1.0, 2.0), (0.1, 0.2))]) for _ in range(panels)])
    with Image.open(path) as picture:
        return picture.width


def test_a_figure_has_no_room_for_panels_that_it_lacks(tmp_path: Path) -> None:
    one, two, three = (width_of(tmp_path / f"{panels}.png", panels) for panels in (1, 2, 3))
    assert one * 2 == two == three


def test_a_row_has_the_differences_of_the_units_that_both_arms_have_and_what_the_plan_says() -> None:
    new = {"c": 0.9, "a": 0.81, "b": 0.7, "only new": 5.0}
    old = {"a": 0.5, "b": 0.4, "c": 0.6, "only old": -5.0}
    (found,) = compare({"new": new, "old": old}, [("new", "old")])
    row = difference_of("new minus old", found, new, old)
    assert row.values == pytest.approx([0.31, 0.3, 0.3])
    assert row.estimate == found.difference
    assert row.told == "p = 0.00012, separated"
    assert row.tested
    shown = difference_of("new minus old", found, new, old, tested=False)
    assert (shown.told, shown.tested, shown.values) == ("not tested", False, row.values)


def test_a_row_of_arms_that_are_alike_is_not_called_separated() -> None:
    new, old = {"a": 0.5, "b": 0.4, "c": 0.6}, {"a": 0.4, "b": 0.5, "c": 0.61}
    (found,) = compare({"new": new, "old": old}, [("new", "old")])
    assert difference_of("new minus old", found, new, old).told == "p = 0.96"
