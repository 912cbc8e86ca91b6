"""The strengths of a benchmark's methods on its page: the Pareto front as a figure, and the pictures at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ether_diffusion.evaluation.subjects.summary import BY_KEY, AtStrength, Metric, Result, arm_title
from ether_diffusion.page.palette import styles
from ether_diffusion.page.pictures import Picture, thumbnail
from ether_diffusion.page.svg import COLOURS, TEXT, Curve, dress, figure_style, inline_svg

FIGURE = (4.6, 3.4)
"""Inches."""


@dataclass(frozen=True)
class StrengthRow:
    """A subject's first prompt at every strength: a picture for each point that is shown."""

    subject: str
    prompt: str
    pictures: list[Picture | None]


def front_figure(points: Sequence[AtStrength], metric: Metric, where: str) -> Curve:
    """The score that decides against CLIP-T: a line through each method's strengths, rings around the front.

    Args:
        points: of all methods at all strengths.
        metric: the score that decides.
        where: names the benchmark, for ids that are unique in the page.
    """
    title = f"{metric.title} and {BY_KEY['clip_t'].title}: methods at their strengths"
    arms: dict[str, list[AtStrength]] = {}
    for each in sorted(points, key=lambda p: p.strength):
        arms.setdefault(arm_title(each.row), []).append(each)
    with figure_style(f"{where} {title}"):
        height = FIGURE[1] + 0.11 * len(arms)
        figure = Figure(figsize=(FIGURE[0], height), layout="constrained")
        axes = figure.subplots()
        known = styles(list(arms))
        for name, of_arm in arms.items():
            style, colour = known[name], COLOURS[known[name].number]
            x, y = zip(*(_place(each, metric) for each in of_arm), strict=True)
            axes.plot(x, y, style.dashes, color=colour, marker=style.marker, markersize=4, linewidth=1, label=name)
        front = sorted(_place(each, metric) for each in points if each.on_front)
        x, y = zip(*front, strict=True)
        axes.scatter(x, y, s=120, facecolors="none", edgecolors=TEXT, label="Pareto front")
        axes.set_ylabel(metric.title, color=TEXT)
        dress(axes, BY_KEY["clip_t"].title, legend=False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=TEXT)
        svg = inline_svg(figure, f"{where} {title}", title)
    return Curve(
        title,
        svg,
        "Means over subjects. Rings: the Pareto front; no other point is better in one score and as "
        "good in the other. A strength needs no training.",
    )


def _place(point: AtStrength, metric: Metric) -> tuple[float, float]:
    scores = point.row["scores"]
    return scores["clip_t"]["mean"], scores[metric.key]["mean"]


def strength_pictures(
    points: Sequence[AtStrength],
    subjects: Sequence[str],
    results_of: Callable[[AtStrength, str], list[Result]],
    path_of: Callable[[Result, str], Path],
    size: int,
) -> list[StrengthRow]:
    """The picture of every subject's first prompt at each strength, of the methods that drew at several.

    Args:
        points: the columns.
        subjects: the rows.
        results_of: of a point and a subject the results, a result per seed; the first is shown.
        path_of: of a result and a file in it where the picture lies.
        size: pixels of a side at most.
    """
    rows = []
    for subject in subjects:
        pictures: list[Picture | None] = []
        prompt = ""
        for point in points:
            found = results_of(point, subject)
            images = found[0]["images"] if found and point.strength == 1 else []
            if found and point.strength != 1:
                images = found[0].get("at", {}).get(f"{point.strength:g}", [])
            if not images:
                pictures.append(None)
                continue
            prompt = prompt or str(found[0]["images"][0]["prompt"])
            told = f"{point.row['arm']} at {point.strength:g}: {subject}"
            source = thumbnail(path_of(found[0], images[0]["file"]), size)
            pictures.append(Picture(source, told, f"{prompt}, strength {point.strength:g}"))
        rows.append(StrengthRow(subject, prompt, pictures))
    return rows
