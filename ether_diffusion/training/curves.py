"""The curves of a run as SVG for an HTML page, in the page's own colours and font."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ether_diffusion.training.run_record import MetricsRow

MAX_DOTS = 600  # single steps drawn per curve

# matplotlib draws with these stand-ins; the page's theme colours replace them
_INK = {
    "#010101": "currentColor",
    "#020202": "var(--line)",
    "#030303": "var(--accent)",
    "#040404": "var(--second)",
    "#050505": "var(--third)",
}
_TEXT, _RULE, *_COLOURS = _INK
_DASHES = ("-", "--", ":")

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """An inline SVG with the sentence that explains it."""

    title: str
    svg: Markup
    caption: str


def draw_curves(metrics: list[MetricsRow]) -> list[Curve]:
    """Loss, learning rate and gradient norm over the steps; none of them before the first step."""
    if not metrics:
        return []
    losses = {"loss": _series(metrics, "loss")}
    if any("prior_loss" in row for row in metrics):
        losses |= {"instance loss": _series(metrics, "instance_loss"), "prior loss": _series(metrics, "prior_loss")}
    rates = {name: [(row["step"], row["lr"][name]) for row in metrics] for name in metrics[0]["lr"]}
    norms = {"gradient norm": _series(metrics, "grad_norm")}
    window = max(1, len(metrics) // 40)
    smoothing = "Every step, not smoothed."
    if window > 1:
        smoothing = f"Dots: single steps. Line: their exponential moving average over {window} steps."
    return [
        _draw("Loss", losses, smoothing, window),
        _draw("Learning rate", rates, "As the scheduler set it.", 1),
        _draw("Gradient norm", norms, smoothing, window),
    ]


def moving_average(values: Iterable[float], window: int) -> list[float]:
    """The exponential moving average with decay 1 - 1/window, free of the bias towards its start."""
    total = weight = 0.0
    averages = []
    for value in values:
        total += (value - total) / window
        weight += (1 - weight) / window
        averages.append(total / weight)
    return averages


def _series(metrics: list[MetricsRow], key: Literal["loss", "instance_loss", "prior_loss", "grad_norm"]) -> Points:
    return [(row["step"], row[key]) for row in metrics if key in row]


def _draw(title: str, series: dict[str, Points], caption: str, window: int) -> Curve:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        for i, (name, points) in enumerate(series.items()):
            _plot(axes, name, points, i, window)
        _dress(axes, legend=len(series) > 1)
        return Curve(title, _inline_svg(figure, title), caption)


def _plot(axes: Axes, name: str, points: Points, i: int, window: int) -> None:
    """The ``i``-th series: a line, and single steps as dots where the line is smoothed or has no length."""
    colour, dashes = _COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)]
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    if window > 1 or len(points) == 1:
        stride = math.ceil(len(points) / MAX_DOTS)
        axes.plot(steps[::stride], values[::stride], ".", color=colour, alpha=0.3, markersize=5, markeredgewidth=0)
    axes.plot(steps, moving_average(values, window), color=colour, linewidth=1.8, linestyle=dashes, label=name)


def _dress(axes: Axes, legend: bool) -> None:
    axes.set_xlabel("step", color=_TEXT)
    axes.tick_params(colors=_TEXT, length=0)
    axes.grid(color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.margins(x=0.02)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=False)
    axes.yaxis.get_offset_text().set_color(_TEXT)
    if legend:
        axes.legend(frameon=False, labelcolor=_TEXT)


def _inline_svg(figure: Figure, title: str) -> Markup:
    """The figure as an SVG element; its ids differ from its neighbours'."""
    buffer = io.StringIO()
    without_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=without_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    prefix = title.lower().replace(" ", "-")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for ink, themed in _INK.items():
        svg = svg.replace(ink, themed)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title} over the training steps"', 1))
