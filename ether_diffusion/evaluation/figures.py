"""Figures of a study as files: panels side by side, lines with their spread; differences with their intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ether_diffusion.evaluation.statistics import Comparison, Estimate
from ether_diffusion.evaluation.subjects.summary import Metric
from ether_diffusion.files import atomic_path
from ether_diffusion.page.palette import LIGHT, THEME, Style, styles
from ether_diffusion.page.text import number


@dataclass(frozen=True)
class Line:
    """A series: ``low`` and ``high`` bound the shade around it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        x_label: below it.
        lines: what it shows.
        log_x: whether x grows by factors.
        log_y: whether y does.
        level: height of a dashed line across: the base model's.
    """

    title: str
    x_label: str
    lines: list[Line] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False
    level: float | None = None


@dataclass(frozen=True)
class Difference:
    """A row of a figure of differences.

    Attributes:
        label: to the left of it.
        values: the difference of each unit, a dot.
        estimate: their mean with its interval, a bar.
        told: to the right of it, such as a p-value.
        tested: whether a plan tests it; what is shown only is paler.
    """

    label: str
    values: Sequence[float]
    estimate: Estimate
    told: str
    tested: bool = True


def difference_of(
    label: str, found: Comparison, first: Mapping[str, float], second: Mapping[str, float], tested: bool = True
) -> Difference:
    """The row of a comparison.

    Args:
        label: to the left of it.
        found: the comparison.
        first: the scores of its arm by unit; those that ``second`` has, too, are drawn.
        second: those of its rival.
        tested: whether a plan tests it.
    """
    values = [first[unit] - second[unit] for unit in sorted(first.keys() & second.keys())]
    told = f"p = {number(found.p_holm, '.2g')}" if tested and found.p_holm is not None else "not tested"
    told += ", separated" * (tested and found.separated)
    return Difference(label, values, found.difference, told, tested)


def score_line(label: str, x: Sequence[float], rows: Sequence[dict[str, Any]], metric: Metric) -> Line:
    """A score of a summary's rows, with its interval as the shade, which has no width where there is none."""
    found = [row["scores"][metric.key] for row in rows]
    low, high = ([each["mean"] if each[part] is None else each[part] for each in found] for part in ("low", "high"))
    return Line(label, x, [each["mean"] for each in found], low, high)


def write_figure(
    path: Path, panels: Sequence[Panel], columns: int = 2, share_y: bool = False, caption: Sequence[str] = ()
) -> None:
    """Write the panels as a PNG; a method has the same colour and marker in all of them.

    Args:
        path: the file.
        panels: from left to right, then down.
        columns: how many stand side by side, if there are so many.
        share_y: whether all have one vertical scale.
        caption: sentences above the panels: of how many subjects and seeds the figures are.
    """
    known = styles(list(dict.fromkeys(line.label for panel in panels for line in panel.lines)))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, known)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if caption:
        width = int(17.5 * figure.get_figwidth())  # characters at this size
        figure.suptitle(textwrap.fill(" ".join(caption), width), fontsize=8, color="#55606e")
    handles = {h.get_label(): h for axes in grid for h in axes.get_legend_handles_labels()[0]}
    widest = 0.6 + 0.09 * max(map(len, handles), default=0)  # inches
    abreast = max(1, int(figure.get_figwidth() / widest))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=abreast, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def write_differences(path: Path, rows: Sequence[Difference], x_label: str) -> None:
    """Write differences as a PNG, one below the other: a dot for each unit, a bar for the interval of the mean.

    Args:
        path: the file.
        rows: from above.
        x_label: what is compared, and of what one dot is.
    """
    soft, accent, ink = (THEME[name][0] for name in ("soft", "accent", "ink"))
    figure = Figure(figsize=(9.2, 1.0 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=soft, linewidth=1)
    for height, row in enumerate(rows):
        colour = accent if row.tested else soft
        axes.plot(row.values, [height] * len(row.values), "o", color=colour, alpha=0.35, markersize=4, linewidth=0)
        if row.estimate.low is not None and row.estimate.high is not None:
            axes.plot([row.estimate.low, row.estimate.high], [height, height], color=colour, linewidth=2.4)
        axes.plot([row.estimate.mean], [height], "D", color=colour, markersize=6)
        axes.annotate(
            *(row.told, (1.01, height)), xycoords=axes.get_yaxis_transform(), va="center", fontsize=9, color=ink
        )
    axes.set_yticks(range(len(rows)), [textwrap.fill(row.label, 44) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(x_label, fontsize=9)
    axes.grid(axis="x", color="#e4e2dd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw(axes: Axes, panel: Panel, known: dict[str, Style]) -> None:
    for line in panel.lines:
        style = known[line.label]
        colour = LIGHT[style.number]
        axes.plot(
            *(line.x, line.y, style.dashes),
            color=colour,
            marker=style.marker,
            markersize=4,
            linewidth=1.6,
            label=line.label,
        )
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.13, linewidth=0)
    if panel.level is not None:
        axes.axhline(panel.level, color="#66676e", linestyle="--", linewidth=1, label="base model")
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.x_label)
    axes.grid(color="#e4e2dd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
