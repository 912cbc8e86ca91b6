"""How often intervals of a mean over few subjects hold the true mean: the reason for the choice in ``statistics``.

Scores of n subjects with two seeds each are drawn with a known mean: a subject's own level (standard deviation 1) plus
what a seed changes (0.5). Each kind of interval says 95 %. Levels are normal, or skewed as scores near a bound are.

``python eval/coverage.py --output_dir runs/coverage``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from tqdm import tqdm

from ether_diffusion.evaluation.statistics import LEVEL, mean_interval
from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table

SUBJECTS = (3, 5, 8, 30)
SEEDS = 2
SEED_DEVIATION = 0.5
"""What a seed changes, where subjects differ by 1."""
RESAMPLES = 999
SHAPES = ("normal", "skewed")

Values = NDArray[np.float64]
Interval = Callable[[Values, np.random.Generator], tuple[float, float]]
"""From scores (subjects, seeds) to the interval of their mean."""


def student(scores: Values, rng: np.random.Generator) -> tuple[float, float]:
    """Student's t over subjects, whose seeds are averaged: what the tables print."""
    found = mean_interval(scores.mean(1))
    if found.low is None or found.high is None:
        raise ValueError("an interval needs two subjects")
    return found.low, found.high


def pairs(scores: Values, rng: np.random.Generator) -> tuple[float, float]:
    """Student's t over pairs of subject and seed, as if these were independent."""
    return student(scores.reshape(-1, 1), rng)


def percentile(scores: Values, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile bootstrap over subjects."""
    return _scipy(scores, rng, "percentile")


def bca(scores: Values, rng: np.random.Generator) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap over subjects (Efron 1987)."""
    return _scipy(scores, rng, "BCa")


def studentised(scores: Values, rng: np.random.Generator) -> tuple[float, float]:
    """Studentised bootstrap over subjects: the quantiles of (m* - m) / se* of the resamples times the error."""
    means = scores.mean(1)
    drawn = rng.choice(means, (RESAMPLES, len(means)))
    errors = drawn.std(1, ddof=1)
    varied = errors > 0  # a resample of one subject alone has no error
    t = (drawn.mean(1) - means.mean())[varied] / errors[varied]
    high, low = np.quantile(t, [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
    error = means.std(ddof=1)
    return float(means.mean() - high * error), float(means.mean() - low * error)


def _scipy(scores: Values, rng: np.random.Generator, method: str) -> tuple[float, float]:
    found = stats.bootstrap(
        (scores.mean(1),), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method=method, rng=rng
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


INTERVALS: dict[str, Interval] = {
    "t over subjects (used)": student,
    "t over pairs of subject and seed": pairs,
    "percentile bootstrap": percentile,
    "BCa bootstrap": bca,
    "studentised bootstrap": studentised,
}


def draw_scores(subjects: int, shape: str, rng: np.random.Generator) -> Values:
    """Scores (subjects, seeds) whose true mean is 0.

    Args:
        subjects: how many.
        shape: of the subjects' levels: normal, or skewed (an exponential distribution).
        rng: of the draws.

    Raises:
        ValueError: there is no such shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"no such shape: {shape!r}; there are {', '.join(SHAPES)}")
    levels = rng.normal(size=(subjects, 1)) if shape == "normal" else rng.exponential(size=(subjects, 1)) - 1
    return levels + SEED_DEVIATION * rng.normal(size=(subjects, SEEDS))


def simulate(rounds: int, seed: int = 0) -> list[dict[str, float | str | int]]:
    """The share of ``rounds`` data sets in which each interval holds the true mean, by shape and number of subjects."""
    rows: list[dict[str, float | str | int]] = []
    for shape in SHAPES:
        for subjects in SUBJECTS:
            rng = np.random.default_rng([seed, subjects, SHAPES.index(shape)])
            held = dict.fromkeys(INTERVALS, 0)
            for _ in tqdm(range(rounds), desc=f"{shape}, {subjects} subjects", unit="data set", leave=False):
                scores = draw_scores(subjects, shape, rng)
                for name, interval in INTERVALS.items():
                    low, high = interval(scores, rng)
                    held[name] += low <= 0 <= high
            rows += [
                {"interval": name, "shape": shape, "subjects": subjects, "coverage": count / rounds}
                for name, count in held.items()
            ]
    return rows


def table(rows: Sequence[dict[str, float | str | int]], rounds: int) -> str:
    """Coverage by kind of interval, a column for each shape and number of subjects."""
    found = {(row["interval"], row["shape"], row["subjects"]): row["coverage"] for row in rows}
    columns = [(shape, subjects) for shape in SHAPES for subjects in SUBJECTS]
    lines = [[name, *(f"{found[name, *column]:.3f}" for column in columns)] for name in INTERVALS]
    error = (LEVEL * (1 - LEVEL) / rounds) ** 0.5
    text = markdown_table(["interval", *(f"{shape}, n = {subjects}" for shape, subjects in columns)], lines)
    return f"{text}\n{rounds:,} data sets in each column; the standard error of a figure of .95 is {error:.3f}.\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: simulate, print the table, write ``coverage.json`` and ``coverage.md``."""
    parser = argparse.ArgumentParser(prog="python eval/coverage.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4000, help="data sets per column (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {given.rounds}")
    rows = simulate(given.rounds, given.seed)
    text = table(rows, given.rounds)
    write_text(given.output_dir / "coverage.json", json.dumps({"rounds": given.rounds, "rows": rows}, indent=1))
    write_text(given.output_dir / "coverage.md", text)
    print(text)
