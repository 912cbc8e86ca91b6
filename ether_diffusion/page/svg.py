"""Figures inside a page, in its own colours and font."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from ether_diffusion.page.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT, RULE, CARD = "#010101", "#020202", "#040404"
COLOURS = tuple(f"#0303{number:02x}" for number in range(len(LIGHT)))
"""What matplotlib draws with: stand-ins, which the page's theme replaces by its text, lines, cards and palette."""
_INK = {TEXT: "currentColor", RULE: "var(--line)", CARD: "var(--card)"} | {
    ink: f"var(--c{place})" for place, ink in enumerate(COLOURS)
}


@dataclass(frozen=True)
class Curve:
    """An inline SVG with the sentence that explains it."""

    title: str
    svg: Markup
    caption: str


@contextmanager
def figure_style(title: str) -> Iterator[None]:
    """What is drawn inside keeps its text as text, and is the same for the same data."""
    import matplotlib  # half a second, which pages without figures do not need

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}):
        yield


def dress(axes: Axes, x_label: str, legend: bool) -> None:
    """Axes as all figures have them: a light grid, no frame."""
    axes.set_xlabel(x_label, color=TEXT)
    axes.tick_params(colors=TEXT, which="both", length=3)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.margins(x=0.02)
    axes.yaxis.get_offset_text().set_color(TEXT)
    if legend:
        axes.legend(facecolor=CARD, edgecolor="none", labelcolor=TEXT)  # lines do not cross its text


def inline_svg(figure: Figure, title: str, label: str) -> Markup:
    """The figure as an SVG element.

    Args:
        figure: drawn in ``TEXT``, ``RULE`` and ``COLOURS``.
        title: unique in the page; keeps the ids of figures apart.
        label: what a screen reader says.
    """
    buffer = io.StringIO()
    without_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=without_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    prefix = "f" + hashlib.sha256(title.encode()).hexdigest()[:8]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for ink, themed in _INK.items():
        svg = svg.replace(ink, themed)
    return Markup(svg.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(label), 1))
