"""The statistics of all tables: intervals of means over subjects, paired differences, and many comparisons at once.

The unit of repetition is what a claim is to hold for in general: the subject in a benchmark, the training in a study of
one data set. What is repeated within a unit (seeds, prompts, pictures) is averaged first. Pairs of subject and seed as
units of their own would be too sure: pictures of one subject resemble each other. ``eval/coverage.py`` shows by
simulation how often each kind of interval holds the truth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from tqdm import tqdm

from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table

LEVEL = 0.95
SUBJECTS = (3, 5, 8, 30)
SEEDS = 2
SEED_DEVIATION = 0.5
"""What a seed changes, where subjects differ by 1."""
RESAMPLES = 999
CHOICE_SEEDS = 3
MARGINS = (0.0, 0.5, 1.0, 2.0)
"""By how much the best setting is better, in what a seed changes."""
RIVAL_SETTINGS = (3, 1)
"""How many settings the other method has."""
SHAPES = ("normal", "skewed")

Values = NDArray[np.float64]
Interval = Callable[[Values, np.random.Generator], tuple[float, float]]
"""From scores (subjects, seeds) to the interval of their mean."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: over the units.
        low: lower end of the 95 % interval; None of a single unit.
        high: upper end.
        p: two-sided p-value of the mean being 0, by the same t statistic; None of a single unit.
        units: how many there are.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    units: int


@dataclass(frozen=True)
class Comparison:
    """A difference of two arms over the units that both have.

    Attributes:
        arm: whose score it is.
        rival: whose score is taken off.
        difference: arm - rival.
        p_holm: p of the difference, corrected for all comparisons of the table; None where there is no p.
    """

    arm: str
    rival: str
    difference: Estimate
    p_holm: float | None

    @property
    def separated(self) -> bool:
        """Whether the corrected p is below 5 %."""
        return self.p_holm is not None and self.p_holm < 1 - LEVEL


def mean_interval(values: Iterable[float], level: float = LEVEL) -> Estimate:
    """Mean and Student's t interval of the units' values, whatever their order.

    Args:
        values: one value of each unit, such as the mean of a subject's pictures over all seeds.
        level: how often the interval is to hold the mean of all units that there could be.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    found = sorted(float(value) for value in values)  # sums of floats depend on the order
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"finite values are needed to take a mean, not {found}")
    count, mean = len(found), math.fsum(found) / len(found)
    if count < 2:
        return Estimate(mean, None, None, None, count)
    error = float(np.std(found, ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    if error == 0:
        return Estimate(mean, mean, mean, float(mean == 0), count)
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Estimate(mean, mean - reach, mean + reach, p, count)


def share_interval(values: Iterable[float], level: float = LEVEL) -> Estimate:
    """Mean and interval of shares from 0 to 1, such as the wins of an arm in each unit.

    Clopper and Pearson's interval (1934) of the binomial distribution, of as many trials as units, with the sum of the
    shares for the successes. No other distribution of shares spreads more, so that it is wide rather than narrow; and
    it has a width where all units agree, which Student's has not.

    Args:
        values: one share of each unit.
        level: how often the interval is to hold the mean of all units that there could be.

    Returns:
        Without a p, since a share is not held against 0; without an interval of a single unit.

    Raises:
        ValueError: there are none, or one is not from 0 to 1.
    """
    found = sorted(float(value) for value in values)
    if not found or not all(0 <= value <= 1 for value in found):
        raise ValueError(f"shares from 0 to 1 are needed, not {found}")
    count, total = len(found), math.fsum(found)
    if count < 2:
        return Estimate(total, None, None, None, count)
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, total, count - total + 1)) if total > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, total + 1, count - total)) if total < count else 1.0
    return Estimate(total / count, low, high, None, count)


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Estimate:
    """Mean and interval of first - second over the units that both have.

    Args:
        first: a value of each unit, by its name.
        second: likewise.

    Raises:
        ValueError: they have no unit in common.
    """
    shared = first.keys() & second.keys()
    if not shared:
        raise ValueError(f"nothing to compare: {sorted(first)} and {sorted(second)} have nothing in common")
    return mean_interval(first[name] - second[name] for name in shared)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (Holm 1979): p-values that may be held against the level however many comparisons there are.

    Args:
        p_values: of all comparisons of a table, in any order.

    Returns:
        The corrected ones in the same order, each at most 1.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def compare(arms: Mapping[str, Mapping[str, float]], pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """The differences of pairs of arms, corrected for their number.

    Args:
        arms: of every arm the units' values by name.
        pairs: an arm and its rival, for each comparison of the table. Those that share no unit are left out.
    """
    known = [(arm, rival) for arm, rival in pairs if arms[arm].keys() & arms[rival].keys()]
    found = [paired_difference(arms[arm], arms[rival]) for arm, rival in known]
    tested = [estimate.p for estimate in found if estimate.p is not None]
    corrected = iter(holm(tested))
    return [
        Comparison(*names, estimate, None if estimate.p is None else next(corrected))
        for names, estimate in zip(known, found, strict=True)
    ]


def against_leader(arms: Mapping[str, Mapping[str, float]]) -> list[Comparison]:
    """The arm with the highest mean against each of the others, the nearest first.

    The leader is chosen from the same values, so its lead is biased upwards.
    """
    means = {arm: mean_interval(values.values()).mean for arm, values in arms.items() if values}
    order = sorted(means, key=lambda arm: (-means[arm], arm))
    return compare(arms, [(order[0], rival) for rival in order[1:]]) if order else []


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


def chosen_by_others(scores: Values) -> NDArray[np.intp]:
    """Of every unit the setting that is best over the *other* units, so that none is chosen by the score that counts.

    Units share the scores that choose, so their differences are correlated and Student's interval is too narrow
    (:func:`simulate_choice`).

    Args:
        scores: (settings, units), of two units or more; the higher, the better.

    Returns:
        The number of a setting for each unit: the first of equal ones.
    """
    return (scores.sum(1, keepdims=True) - scores).argmax(0)


def chosen_by_all(scores: Values) -> NDArray[np.intp]:
    """Of every unit the setting that is best over all units, as :func:`chosen_by_others` has it."""
    return np.full(scores.shape[1], scores.sum(1).argmax())


CHOICES = {"by all seeds (used)": chosen_by_all, "by the other seeds": chosen_by_others}
"""From scores (settings, seeds) to the setting at which each seed counts."""


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
    """How often intervals of a mean over few subjects hold the true mean: why the tables have Student's t.

    Scores of n subjects with two seeds each are drawn with a known mean: a subject's own level (standard deviation 1)
    plus what a seed changes (0.5). Each kind of interval says 95 %. Levels are normal, or skewed as scores near a
    bound.

    Returns:
        The share of ``rounds`` data sets in which each interval holds the true mean, by shape and number of subjects.
    """
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


def simulate_choice(rounds: int, seed: int = 0) -> list[dict[str, float | str | int]]:
    """How often intervals hold the truth where a method's setting was chosen from the scores that are compared.

    One method has three settings, one of which is better than the other two by a margin; its rival has as many, or one.
    There is no difference between the best settings of both. A seed changes a score by a standard deviation of 1. Both
    are compared over three seeds, each seed at the settings that are chosen by all seeds, or by the other seeds.

    Returns:
        The share of ``rounds`` data sets in which Student's interval of the difference holds 0 (``coverage``), and the
        mean difference (``bias``).
    """
    rows: list[dict[str, float | str | int]] = []
    for settings in RIVAL_SETTINGS:
        for margin in MARGINS:
            rng = np.random.default_rng([seed, settings, int(100 * margin)])
            held, total = dict.fromkeys(CHOICES, 0), dict.fromkeys(CHOICES, 0.0)
            levels = np.array([0.0, -margin, -margin])[:, None]
            for _ in range(rounds):
                first, second = (levels[:count] + rng.normal(size=(count, CHOICE_SEEDS)) for count in (3, settings))
                for rule, choose in CHOICES.items():
                    chosen = [scores[choose(scores), np.arange(CHOICE_SEEDS)] for scores in (first, second)]
                    difference = chosen[0] - chosen[1]
                    low, high = student(difference[:, None], rng)
                    held[rule] += low <= 0 <= high
                    total[rule] += float(difference.mean())
            rows += [
                {
                    **{"choice": rule, "settings": settings, "margin": margin},
                    **{"coverage": held[rule] / rounds, "bias": round(total[rule] / rounds, 4)},
                }
                for rule in CHOICES
            ]
    return rows


def coverage_table(rows: Sequence[dict[str, float | str | int]], rounds: int) -> str:
    """Coverage by kind of interval, a column for each shape and number of subjects."""
    found = {(row["interval"], row["shape"], row["subjects"]): row["coverage"] for row in rows}
    columns = [(shape, subjects) for shape in SHAPES for subjects in SUBJECTS]
    lines = [[name, *(f"{found[name, *column]:.3f}" for column in columns)] for name in INTERVALS]
    error = (LEVEL * (1 - LEVEL) / rounds) ** 0.5
    text = markdown_table(["interval", *(f"{shape}, n = {subjects}" for shape, subjects in columns)], lines)
    return f"{text}\n{rounds:,} data sets in each column; the standard error of a figure of .95 is {error:.3f}.\n"


def choice_table(rows: Sequence[dict[str, float | str | int]]) -> str:
    """Coverage and bias by the rule that chooses, a column for each number of the rival's settings and each margin."""
    found = {(row["choice"], row["settings"], row["margin"]): row for row in rows}
    columns = [(settings, margin) for settings in RIVAL_SETTINGS for margin in MARGINS]
    lines = [
        [rule, *(f"{found[rule, *column]['coverage']:.3f} ({found[rule, *column]['bias']:+.2f})" for column in columns)]
        for rule in CHOICES
    ]
    heads = [f"3 and {settings}, margin {margin:g}" for settings, margin in columns]
    return markdown_table(["settings are chosen", *heads], lines)


def study_coverage(rounds: int, seed: int, folder: Path) -> str:
    """Simulate, and write ``coverage.json`` and ``coverage.md``; the text of both tables."""
    rows, chosen = simulate(rounds, seed), simulate_choice(rounds, seed)
    text = f"{coverage_table(rows, rounds)}\n{choice_table(chosen)}"
    write_text(folder / "coverage.json", json.dumps({"rounds": rounds, "rows": rows, "chosen": chosen}, indent=1))
    write_text(folder / "coverage.md", text)
    return text
