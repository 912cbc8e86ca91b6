"""The curves of a run as SVG for an HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from ether_diffusion.page.svg import COLOURS, TEXT, Curve, dress, figure_style, inline_svg
from ether_diffusion.runs.choosing import KEPT_CLIP_T, ScoredStep, best_step, prompt_floor
from ether_diffusion.runs.record import MetricsRow, ValidationRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_DOTS = 600  # single steps drawn per curve

_DASHES = ("-", "--", ":")

Points = list[tuple[int, float]]


def draw_curves(metrics: list[MetricsRow], validation: list[ValidationRow]) -> list[Curve]:
    """Loss, that on fixed pictures, learning rate and gradient norm over the steps; none before the first step."""
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
    fixed: dict[str, Points] = {"loss on fixed pictures": [(row["step"], row["loss"]) for row in validation]}
    still = "The same pictures, noise and times at every step with samples; step 0 is the base."
    return [
        _draw("Loss", losses, smoothing, window),
        *([_draw("Loss on fixed pictures", fixed, still, 1)] if validation else []),
        _draw("Learning rate", rates, "As the scheduler set it.", 1),
        _draw("Gradient norm", norms, smoothing, window),
    ]


def draw_sample_scores(rows: list[ScoredStep]) -> list[Curve]:
    """Likeness, copying and prompt of the samples over the steps, the best step marked; none before the first step."""
    steps = sorted(rows, key=lambda row: row["step"])
    if not any(row["step"] for row in steps):
        return []
    best, floor = best_step(rows), prompt_floor(rows)
    likeness: dict[str, Points] = {
        "likeness (DINO)": [(row["step"], row["dino"]) for row in steps],
        "nearest reference": [(row["step"], row["dino_nearest"]) for row in steps],
        "truth-likeness": [(row["step"], row["truth"]) for row in steps if "truth" in row],
    }
    among = next((row["references_nearest"] for row in steps if "references_nearest" in row), None)
    prompts: dict[str, Points] = {"CLIP-T": [(row["step"], row["clip_t"]) for row in steps]}
    marked = "" if best is None else f" The upright line is step {best:,}, the best."
    copying = (
        "A nearest reference that rises with the likeness is copying."
        if among is None
        else "Dashed: the nearest other picture among the references; samples above it are copies."
    )
    kept = "" if floor is None else f" Dashed: {KEPT_CLIP_T:.0%} of the base's, which a step must keep to be the best."
    return [
        _draw_scores("Likeness and copying", likeness, among, best, copying + marked),
        _draw_scores("Following the prompt", prompts, floor, best, f"CLIP-T of the samples.{kept}{marked}"),
    ]


def _draw_scores(title: str, series: dict[str, Points], level: float | None, best: int | None, caption: str) -> Curve:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with figure_style(title):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate((name, points) for name, points in series.items() if points):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, _DASHES[number], color=COLOURS[number], linewidth=1.8, marker="o", markersize=4, label=name)
        if level is not None:
            axes.axhline(level, color=TEXT, linestyle=(0, (4, 3)), linewidth=1)
        if best is not None:
            axes.axvline(best, color=TEXT, linewidth=1)
        dress(axes, "step", legend=len(series) > 1)
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        marked = "" if best is None else f"; the best is step {best}"
        return Curve(title, inline_svg(figure, title, f"{title} over the training steps{marked}"), caption)


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
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with figure_style(title):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        for i, (name, points) in enumerate(series.items()):
            _plot(axes, name, points, i, window)
        dress(axes, "step", legend=len(series) > 1)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=False)
        return Curve(title, inline_svg(figure, title, f"{title} over the training steps"), caption)


def _plot(axes: Axes, name: str, points: Points, i: int, window: int) -> None:
    """The ``i``-th series: a line, and single steps as dots where the line is smoothed or has no length."""
    colour, dashes = COLOURS[i % len(COLOURS)], _DASHES[i % len(_DASHES)]
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    if window > 1 or len(points) == 1:
        stride = math.ceil(len(points) / MAX_DOTS)
        axes.plot(steps[::stride], values[::stride], ".", color=colour, alpha=0.3, markersize=5, markeredgewidth=0)
    axes.plot(steps, moving_average(values, window), color=colour, linewidth=1.8, linestyle=dashes, label=name)
