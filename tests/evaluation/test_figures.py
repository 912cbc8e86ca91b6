"""Figures of several panels."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ether_diffusion.evaluation.figures import Line, Panel, write_figure


def width_of(path: Path, panels: int) -> int:
    write_figure(path, [Panel("score", "rate", [Line("a", (1.0, 2.0), (0.1, 0.2))]) for _ in range(panels)])
    with Image.open(path) as picture:
        return picture.width


def test_a_figure_has_no_room_for_panels_that_it_lacks(tmp_path: Path) -> None:
    one, two, three = (width_of(tmp_path / f"{panels}.png", panels) for panels in (1, 2, 3))
    assert one * 2 == two == three
