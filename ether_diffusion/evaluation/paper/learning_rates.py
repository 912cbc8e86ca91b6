"""Sec. 5.3, Fig. 4 to 6: quality and distance against the learning rate, and one number for how little it matters.

The study is a benchmark whose arms have many learning rates; its figure and table are made from the results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ether_diffusion.evaluation.figures import Line, Panel, score_line, write_figure
from ether_diffusion.evaluation.paper.rate_losses import write_losses
from ether_diffusion.evaluation.paper.settings import RatesConfig
from ether_diffusion.evaluation.statistics import mean_interval
from ether_diffusion.evaluation.subjects.settings import BASE
from ether_diffusion.evaluation.subjects.summary import (
    BY_KEY,
    Metric,
    Result,
    all_results,
    best_rates,
    primary,
    summarize,
    unit_values,
)
from ether_diffusion.evaluation.tables import caption, format_score, judges_line
from ether_diffusion.files import write_text
from ether_diffusion.page.text import interval, markdown_table

TOLERANCES = (0.05, 0.10, 0.20)
"""How far below a method's own best still counts as good: shares of what it gains over the base."""


@dataclass(frozen=True)
class Width:
    """Over which learning rates a method is good.

    Attributes:
        decades: log10 of the highest over the lowest good rate.
        low: the lowest good rate.
        high: the highest.
        best: the tested rate with the best score.
        open_low: whether the lowest tested rate is still good, so that the range may go on below it.
        open_high: whether the highest tested rate is still good.
    """

    decades: float
    low: float
    high: float
    best: float
    open_low: bool
    open_high: bool


def good_width(rates: Sequence[float], scores: Sequence[float | None], base: float, tolerance: float) -> Width:
    """The connected range around the best rate in which the score stays within ``tolerance`` of the best.

    Between two tested rates the score is taken as linear in the logarithm of the rate; towards a rate that has no
    score, because a training diverged there, the range ends at the last good one.

    Args:
        rates: tested learning rates, ascending.
        scores: of each, higher is better; None where a training diverged.
        base: score of the base model; a method that gains nothing has the width of its best rate alone.
        tolerance: share of the gain, the best score less the base's.

    Raises:
        ValueError: there are fewer than two rates, they do not ascend, or all trainings diverged.
    """
    if len(rates) < 2 or len(rates) != len(scores) or any(a >= b for a, b in pairwise(rates)):
        raise ValueError(f"at least two ascending learning rates are needed, each with a score, not {list(rates)}")
    known = {index: value for index, value in enumerate(scores) if value is not None}
    if not known:
        raise ValueError("no training came to its end at any learning rate")
    x, best = np.log10(rates), max(known, key=lambda index: known[index])
    floor = known[best] - tolerance * max(0.0, known[best] - base)

    def edge(step: int) -> tuple[float, bool]:
        last = best
        while known.get(last + step, -np.inf) >= floor:
            last += step
        if not 0 <= last + step < len(scores):
            return float(x[last]), True
        if last + step not in known:
            return float(x[last]), False
        share = (known[last] - floor) / (known[last] - known[last + step])
        return float(x[last] + share * (x[last + step] - x[last])), False

    (low, open_low), (high, open_high) = edge(-1), edge(1)
    return Width(high - low, 10**low, 10**high, rates[best], open_low, open_high)


def curves(results: list[Result]) -> dict[str, list[dict[str, Any]]]:
    """The rows of the summary of each arm, by ascending learning rate, with the spread of the distances beside them."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in summarize(results):
        if row["learning_rate"] is None:
            continue
        mine = [r for r in results if (r["arm"], r["learning_rate"]) == (row["arm"], row["learning_rate"])]
        row["distance_spread"] = {
            name: float(np.std([result["distances"][name] for result in mine])) for name in row.get("distances", {})
        }
        arms.setdefault(row["arm"], []).append(row)
    return {arm: sorted(rows, key=lambda row: row["learning_rate"]) for arm, rows in arms.items()}


def analyse(folder: Path, results: list[Result]) -> str:
    """Write ``robustness.json``, ``robustness.md`` and ``learning_rates.png`` into ``folder``; return the tables.

    Raises:
        ValueError: no arm was run with two learning rates.
    """
    arms = {arm: rows for arm, rows in curves(results).items() if len(rows) > 1}
    if not arms:
        raise ValueError("no method has results at two learning rates: there is no width to measure")
    summary = summarize(results)
    metric = primary(summary)
    widths = {arm: widths_by_subject(results, arm, metric) for arm in arms}
    best = {row["arm"]: row for row in best_rates(summary)}
    arms = {arm: [row for row in rows if not row["diverged"]] for arm, rows in arms.items()}
    base = [row for row in summary if row["arm"] == BASE]
    floor = {key: base[0]["scores"][key]["mean"] for key in (metric.key, "clip_t")} if base else {}
    told = caption(summary, [])
    write_figure(folder / "learning_rates.png", panels(arms, floor, metric), caption=told)
    text = (
        "\n".join(
            [rates_table(arms, best, metric), widths_table(widths, metric), *told, judges_line(results[0]["judges"])]
        )
        + "\n"
    )
    found = {
        arm: {"best": None if arm not in best else best[arm]["learning_rate"], "widths": widths[arm], "rows": rows}
        for arm, rows in arms.items()
    }
    content = {"score": metric.key, "tolerances": TOLERANCES, "arms": found, "base": floor}
    write_text(folder / "robustness.json", json.dumps(content, indent=1, default=asdict))
    write_text(folder / "robustness.md", text)
    return text


def widths_by_subject(results: list[Result], arm: str, metric: Metric) -> dict[str, list[Width]]:
    """The widths of an arm at every tolerance, for each subject by itself, whose seeds are averaged.

    A subject without the base's score, or whose trainings all diverged, is left out.
    """
    base = unit_values([result for result in results if result["arm"] == BASE], metric)
    mine = [result for result in results if result["arm"] == arm]
    rates = sorted({result["learning_rate"] for result in mine})
    found = {}
    for subject in dict.fromkeys(result["subject"] for result in mine):
        scores: list[float | None] = []
        for rate in rates:
            of_rate = [r for r in mine if (r["subject"], r["learning_rate"]) == (subject, rate)]
            diverged = any(result.get("diverged") for result in of_rate)
            scores.append(None if diverged else unit_values(of_rate, metric).get(subject))
        if subject in base and any(score is not None for score in scores):
            found[subject] = [good_width(rates, scores, base[subject], share) for share in TOLERANCES]
    return found


def panels(arms: dict[str, list[dict[str, Any]]], base: dict[str, float], metric: Metric) -> list[Panel]:
    """The four panels: the score that decides, CLIP-T, and the two distances, against the learning rate."""

    def of_score(shown: Metric) -> list[Line]:
        return [score_line(arm, [r["learning_rate"] for r in rows], rows, shown) for arm, rows in arms.items()]

    def of_distance(name: str) -> list[Line]:
        lines = []
        for arm, rows in arms.items():
            known = [row for row in rows if name in row.get("distances", {})]
            values = [row["distances"][name] for row in known]
            spread = [row["distance_spread"][name] for row in known]
            low, high = (([v + sign * s for v, s in zip(values, spread, strict=True)]) for sign in (-1, 1))
            lines.append(Line(arm, [row["learning_rate"] for row in known], values, low, high))
        return [line for line in lines if line.x]

    rate = "learning rate"
    return [
        Panel(metric.title, rate, of_score(metric), log_x=True, level=base.get(metric.key)),
        Panel("CLIP-T", rate, of_score(BY_KEY["clip_t"]), log_x=True, level=base.get("clip_t")),
        Panel("Transformation distance ‖T − I‖", rate, of_distance("transforms"), log_x=True, log_y=True),
        Panel("Weights distance ‖W′ − W‖", rate, of_distance("weights"), log_x=True, log_y=True),
    ]


def rates_table(arms: dict[str, list[dict[str, Any]]], best: dict[str, dict[str, Any]], metric: Metric) -> str:
    """One row per method and rate: the score that decides, CLIP-T, and which rate is the best."""
    lines = []
    for arm, rows in arms.items():
        for row in rows:
            chosen = "best" if arm in best and row["learning_rate"] == best[arm]["learning_rate"] else ""
            cells = [format_score(row["scores"].get(each.key)) for each in (metric, BY_KEY["clip_t"])]
            lines.append([arm, f"{row['learning_rate']:g}", *cells, chosen])
    return markdown_table(["method", "learning rate", metric.heading, "CLIP-T ↑", ""], lines)


def widths_table(widths: dict[str, dict[str, list[Width]]], metric: Metric) -> str:
    """One row per method: its width in decades at every tolerance, the mean over subjects with its interval.

    ≥: for some subject the range goes on beyond the rates that were tried.
    """
    lines = []
    for arm, of_subjects in widths.items():
        cells = []
        for number in range(len(TOLERANCES)):
            found = [of_subject[number] for of_subject in of_subjects.values()]
            decades = mean_interval(width.decades for width in found) if found else None
            open_end = "≥ " if any(width.open_low or width.open_high for width in found) else ""
            width = None if decades is None else interval(decades.mean, decades.low, decades.high, ".2f")
            cells.append("" if width is None else f"{open_end}{width}")
        lines.append([arm, *cells])
    gain = f"of the gain in {metric.title}"
    return markdown_table(["decades", *(f"within {share:.0%} {gain}" for share in TOLERANCES)], lines)


def rate_tables(config: RatesConfig) -> Iterator[str]:
    """The tables of a benchmark that is done, one after the other, as its figure and files are written.

    Raises:
        ValueError: there is nothing to compare.
    """
    results = all_results(config.output_dir)
    yield analyse(config.output_dir, results)
    if config.tuned_rates:
        shown = (config.tuned_rates, primary(summarize(results)), config.factor, config.reference)
        yield write_losses(config.output_dir, results, *shown)
