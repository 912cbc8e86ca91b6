"""Curves of the page of many runs: scores against the learning rate, and the losses of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ether_diffusion.evaluation.subjects.found import Benchmark
from ether_diffusion.evaluation.subjects.summary import Metric
from ether_diffusion.page.palette import styles
from ether_diffusion.page.svg import COLOURS, TEXT, Curve, dress, figure_style, inline_svg
from ether_diffusion.page.text import distinct_names
from ether_diffusion.runs.curves import moving_average
from ether_diffusion.runs.record import Run

FIGURE = (4.6, 2.9)
"""Inches: what fills a phone's width with letters that can be read."""
MAX_LEGEND = 6


def rate_curves(benchmark: Benchmark, metrics: Sequence[Metric]) -> list[Curve]:
    """Scores against the learning rate, where an arm has several."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in benchmark.rows:
        if row["learning_rate"] is not None and not row["diverged"]:
            arms.setdefault(row["arm"], []).append(row)
    several = {arm: sorted(rows, key=lambda row: row["learning_rate"]) for arm, rows in arms.items() if len(rows) > 1}
    if not several:
        return []
    return [_rate_curve(several, metric, benchmark.name) for metric in metrics]


def _rate_curve(arms: dict[str, list[dict[str, Any]]], metric: Metric, where: str) -> Curve:
    title = f"{metric.title} against the learning rate"
    with figure_style(f"{where} {title}"):
        figure = Figure(figsize=FIGURE, layout="constrained")
        axes = figure.subplots()
        known = styles(list(arms))
        for arm, rows in arms.items():
            style = known[arm]
            colour = COLOURS[style.number]
            rates = [row["learning_rate"] for row in rows]
            score = [row["scores"][metric.key] for row in rows]
            axes.plot(
                *(rates, [s["mean"] for s in score], style.dashes),
                color=colour,
                marker=style.marker,
                markersize=4,
                label=arm,
            )
            if all(s["low"] is not None for s in score):
                low, high = ([s[part] for s in score] for part in ("low", "high"))
                axes.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        dress(axes, "learning rate", legend=True)
        svg = inline_svg(figure, f"{where} {title}", title)
    return Curve(title, svg, "Mean over subjects; the shade is its 95 % interval, where there are several.")


def loss_curves(runs: Sequence[Run]) -> list[Curve]:
    """The smoothed losses of all runs in one figure."""
    known = [run for run in runs if run.metrics]
    if not known:
        return []
    title = "Loss of the runs"
    with figure_style(title):
        width, height = FIGURE
        many = len(known) > MAX_LEGEND
        figure = Figure(figsize=(width, height + 0.1 * len(known) * many), layout="constrained")
        axes = figure.subplots()
        names = distinct_names([run.folder for run in known])
        drawn = styles(names, [run.method for run in known])
        for name, run in zip(names, known, strict=True):
            values = moving_average([row["loss"] for row in run.metrics], max(1, len(run.metrics) // 20))
            style, steps = drawn[name], [row["step"] for row in run.metrics]
            axes.plot(steps, values, style.dashes, color=COLOURS[style.number], label=name)
        dress(axes, "step", legend=not many)
        if many:  # beside the lines there is no room
            figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=TEXT)
        return [
            Curve(title, inline_svg(figure, title, title), "Exponential moving averages over a twentieth of the steps.")
        ]
