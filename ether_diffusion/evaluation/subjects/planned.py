"""Comparisons that a plan names before a study runs: differences of arms at chosen rates, paired by subject."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from ether_diffusion.evaluation.figures import Difference, difference_of, write_differences
from ether_diffusion.evaluation.statistics import Comparison, compare
from ether_diffusion.evaluation.subjects.settings import BASE, Sides, cell_of
from ether_diffusion.evaluation.subjects.summary import Metric, Result, unit_values
from ether_diffusion.evaluation.tables import comparison_cells
from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table


def scores_of_cell(results: Sequence[Result], cell: str, metric: Metric) -> dict[str, float]:
    """The score of each subject, seeds and prompts averaged; the base's where a training diverged.

    Args:
        results: of the benchmark.
        cell: ``arm`` or ``arm@rate``.
        metric: higher is better.

    Raises:
        ValueError: nothing was run there.
    """
    arm, rate = cell_of(cell)
    mine = [r for r in results if r["arm"] == arm and (rate is None or r["learning_rate"] == rate)]
    if not mine:
        raise ValueError(f"there are no results of {cell}")
    return scores_or_base(mine, [r for r in results if r["arm"] == BASE], metric)[0]


def scores_or_base(mine: Sequence[Result], base: Sequence[Result], metric: Metric) -> tuple[dict[str, float], int]:
    """The score of each subject that the base has, too: the base's where a training diverged; and how many did."""
    floor = unit_values(base, metric)
    diverged = {result["subject"] for result in mine if result.get("diverged")}
    scores = unit_values(mine, metric) | {subject: floor[subject] for subject in diverged if subject in floor}
    return {subject: scores[subject] for subject in scores.keys() & floor.keys()}, len(diverged)


def scores_of_sides(
    results: Sequence[Result], planned: Mapping[str, Sides], metric: Metric
) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """The score of each subject on both sides of each comparison; of several cells, their mean.

    Raises:
        ValueError: a cell has no results.
    """

    def score(side: Sequence[str]) -> dict[str, float]:
        cells = [scores_of_cell(results, cell, metric) for cell in side]
        shared = set.intersection(*(set(cell) for cell in cells))
        return {subject: fmean(cell[subject] for cell in cells) for subject in shared}

    return {title: (score(sides[0]), score(sides[1])) for title, sides in planned.items()}


def planned_comparisons(results: Sequence[Result], planned: Mapping[str, Sides], metric: Metric) -> list[Comparison]:
    """The difference of both sides of each comparison, paired by subject, corrected by Holm for all of them.

    Raises:
        ValueError: a cell has no results.
    """
    values: dict[str, dict[str, float]] = {}
    for title, (first, second) in scores_of_sides(results, planned, metric).items():
        values |= {title: first, f"{title}, second": second}
    return compare(values, [(title, f"{title}, second") for title in planned])


def draw_planned(
    path: Path,
    results: Sequence[Result],
    planned: Mapping[str, Sides],
    secondary: Mapping[str, Sides],
    metric: Metric,
) -> None:
    """Draw every comparison: the difference of each subject, their mean, its interval, and p.

    Args:
        path: the picture.
        results: of the benchmark.
        planned: the comparisons that are tested.
        secondary: those that have intervals and no test; paler.
        metric: what is compared.

    Raises:
        ValueError: a cell has no results.
    """
    rows: list[Difference] = []
    for comparisons, tested in ((planned, True), (secondary, False)):
        both = scores_of_sides(results, comparisons, metric)
        rows += [
            difference_of(found.arm, found, *both[found.arm], tested)
            for found in planned_comparisons(results, comparisons, metric)
        ]
    write_differences(path, rows, f"difference of {metric.title}; a dot is a subject, the bar the mean's 95 % interval")


FILES = ("planned.json", "planned.md", "planned.png")
"""In the benchmark's folder."""


def write_planned(
    folder: Path,
    results: Sequence[Result],
    planned: Mapping[str, Sides],
    secondary: Mapping[str, Sides],
    metric: Metric,
) -> str:
    """Write :data:`FILES` into ``folder``; return the tables.

    Args:
        folder: where to.
        results: of the benchmark.
        planned: the comparisons that are tested.
        secondary: those that have intervals and no test.
        metric: what is compared.

    Raises:
        ValueError: a cell has no results.
    """
    tested = planned_comparisons(results, planned, metric)
    shown = planned_comparisons(results, secondary, metric)
    heads = ["", f"difference of {metric.title}, 95 % interval", "p (Holm)", "subjects", ""]
    parts = []
    if tested:
        parts.append(markdown_table(heads, [[each.arm, *comparison_cells(each)] for each in tested]))
    if shown:
        rows = [[each.arm, *comparison_cells(each)[:1]] for each in shown]
        parts.append("Not tested:\n\n" + markdown_table(heads[:2], rows))
    text = "\n".join(parts)
    content = {"score": metric.key, "planned": tested, "secondary": shown}
    data, tables, drawing = (folder / name for name in FILES)
    write_text(data, json.dumps(content, indent=1, default=asdict))
    write_text(tables, text)
    draw_planned(drawing, results, planned, secondary, metric)
    return text
