"""Sec. 5.3, Fig. 4 to 6: quality and distance against the learning rate, and one number for how little it matters.

The study is a benchmark whose arms have many learning rates; its figure and table are made from the results.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ether_diffusion.evaluation.benchmark import run_benchmark
from ether_diffusion.evaluation.figures import Line, Panel, write_figure
from ether_diffusion.evaluation.jobs import BASE, BenchmarkConfig
from ether_diffusion.evaluation.summary import Result, all_results, summarize
from ether_diffusion.files import write_text
from ether_diffusion.training.cli import parse_config

TOLERANCE = 0.05
"""How far below a method's own best still counts as good: a share of the best."""


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


def good_width(rates: Sequence[float], scores: Sequence[float | None], tolerance: float = TOLERANCE) -> Width:
    """The connected range around the best rate in which the score stays within ``tolerance`` of the best.

    Between two tested rates the score is taken as linear in the logarithm of the rate; towards a rate that has no
    score, because a training diverged there, the range ends at the last good one.

    Args:
        rates: tested learning rates, ascending.
        scores: of each, higher is better; None where a training diverged.
        tolerance: share of the best score's absolute value.

    Raises:
        ValueError: there are fewer than two rates, they do not ascend, or all trainings diverged.
    """
    if len(rates) < 2 or len(rates) != len(scores) or any(a >= b for a, b in pairwise(rates)):
        raise ValueError(f"at least two ascending learning rates are needed, each with a score, not {list(rates)}")
    known = {index: value for index, value in enumerate(scores) if value is not None}
    if not known:
        raise ValueError("no training came to its end at any learning rate")
    x, best = np.log10(rates), max(known, key=lambda index: known[index])
    floor = known[best] - tolerance * abs(known[best])

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
    """Write ``robustness.json``, ``robustness.md`` and ``learning_rates.png`` into ``folder``; return the table.

    Raises:
        ValueError: no arm was run with two learning rates.
    """
    arms = {arm: rows for arm, rows in curves(results).items() if len(rows) > 1}
    if not arms:
        raise ValueError("no method has results at two learning rates: there is no width to measure")
    widths = {
        arm: good_width(
            [row["learning_rate"] for row in rows],
            [None if row["diverged"] else row["scores"]["dino"]["mean"] for row in rows],
        )
        for arm, rows in arms.items()
    }
    arms = {arm: [row for row in rows if not row["diverged"]] for arm, rows in arms.items()}
    base = [row for row in summarize(results) if row["arm"] == BASE]
    floor = {key: base[0]["scores"][key]["mean"] for key in ("dino", "clip_t")} if base else {}
    write_figure(folder / "learning_rates.png", panels(arms, floor))
    text = table(arms, widths)
    found = {arm: {"width": asdict(widths[arm]), "rows": rows} for arm, rows in arms.items()}
    write_text(folder / "robustness.json", json.dumps({"tolerance": TOLERANCE, "arms": found, "base": floor}, indent=1))
    write_text(folder / "robustness.md", text)
    return text


def panels(arms: dict[str, list[dict[str, Any]]], base: dict[str, float]) -> list[Panel]:
    """The four panels: subject fidelity, prompt fidelity, and the two distances, against the learning rate."""

    def of_score(key: str) -> list[Line]:
        return [
            Line(
                arm,
                [row["learning_rate"] for row in rows],
                [row["scores"][key]["mean"] for row in rows],
                *([_bound(row["scores"][key], part) for row in rows] for part in ("low", "high")),
            )
            for arm, rows in arms.items()
        ]

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
        Panel("Subject fidelity (DINO)", rate, of_score("dino"), log_x=True, level=base.get("dino")),
        Panel("Prompt fidelity (CLIP-T)", rate, of_score("clip_t"), log_x=True, level=base.get("clip_t")),
        Panel("Transformation distance ‖T − I‖", rate, of_distance("transforms"), log_x=True, log_y=True),
        Panel("Weights distance ‖W′ − W‖", rate, of_distance("weights"), log_x=True, log_y=True),
    ]


def _bound(score: dict[str, float], part: str) -> float:
    """An end of the interval; the mean itself where there is none."""
    return score["mean"] if score[part] is None else score[part]


def table(arms: dict[str, list[dict[str, Any]]], widths: dict[str, Width]) -> str:
    """One row per method: its best rate and scores there, and the width; ≥ where the tested range ends before it."""
    lines = [
        f"| method | best rate | DINO there | CLIP-T there | decades within {TOLERANCE:.0%} of its best | from | to |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for arm, width in sorted(widths.items(), key=lambda item: -item[1].decades):
        row = next(row for row in arms[arm] if row["learning_rate"] == width.best)
        dino, clip = (row["scores"][key]["mean"] for key in ("dino", "clip_t"))
        at_least = "≥ " if width.open_low or width.open_high else ""
        low, high = (
            f"{'≤ ' if width.open_low else ''}{width.low:.1e}",
            f"{'≥ ' if width.open_high else ''}{width.high:.1e}",
        )
        lines.append(
            f"| {arm} | {width.best:g} | {dino:.3f} | {clip:.3f} | {at_least}{width.decades:.2f} | {low} | {high} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: the benchmark, unless it is done, and the study of its results.

    Raises:
        SystemExit: a setting is impossible, jobs failed, or there is nothing to compare.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    config = parse_config(BenchmarkConfig, arguments)
    if not run_benchmark(config):
        print("other processes have jobs left; the last one to finish makes the figure")
        return
    try:
        print(analyse(config.output_dir, all_results(config.output_dir)))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"figure: {config.output_dir / 'learning_rates.png'}")
