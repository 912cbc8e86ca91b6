"""The statistics of all tables: intervals of means over subjects, paired differences, and many comparisons at once.

The unit of repetition is what a claim is to hold for in general: the subject in a benchmark, the training in a study of
one data set. What is repeated within a unit (seeds, prompts, pictures) is averaged first. Pairs of subject and seed as
units of their own would be too sure: pictures of one subject resemble each other. ``eval/coverage.py`` shows by
simulation how often each kind of interval holds the truth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


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
