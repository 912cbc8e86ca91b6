"""What a wrong learning rate costs: the score at the rate that was found for a method, less that at multiples of it.

The rates are found on other subjects, so nothing here is chosen by what is measured (docs/studies/learning-rates.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from ether_diffusion.evaluation.statistics import Comparison, Estimate, compare, mean_interval
from ether_diffusion.evaluation.subjects.planned import scores_or_base
from ether_diffusion.evaluation.subjects.settings import BASE
from ether_diffusion.evaluation.subjects.summary import Metric, Result, unit_values
from ether_diffusion.evaluation.tables import comparison_cells, format_difference
from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table

Subjects = dict[str, float]
"""A value of each subject."""


@dataclass(frozen=True)
class RateLoss:
    """What a method loses at a multiple of its rate.

    Attributes:
        arm: the method.
        factor: the multiple, to one digit.
        by_subject: s(r*) - s(factor r*); of a training that diverged, s is the base's.
        mean: over the subjects, with Student's interval.
        share: the mean loss as a share of the mean gain, s(r*) less the base's.
        diverged: trainings at this rate that diverged.
    """

    arm: str
    factor: float
    by_subject: Subjects
    mean: Estimate
    share: float
    diverged: int


def rate_losses(results: Sequence[Result], tuned: Mapping[str, float], metric: Metric) -> list[RateLoss]:
    """The losses of all methods at all rates that were run, by method and ascending factor.

    Args:
        results: of a benchmark whose arms have several learning rates.
        tuned: r* of each method.
        metric: s; higher is better.

    Raises:
        ValueError: a method has no result at its r*, or the base has none.
    """
    of_base = [result for result in results if result["arm"] == BASE]
    base = unit_values(of_base, metric)
    found = []
    for arm, rate in tuned.items():
        by_rate = _scores(results, arm, of_base, metric)
        if rate not in by_rate:
            raise ValueError(f"tuned_rates: {arm} was not run at {rate:g}; it was at {', '.join(map(str, by_rate))}")
        right = by_rate[rate][0]
        gain = fmean(right[subject] - base[subject] for subject in right)
        for other, (scores, diverged) in sorted(by_rate.items()):
            lost = {subject: right[subject] - scores[subject] for subject in right.keys() & scores.keys()}
            estimate = mean_interval(lost.values())
            factor = float(f"{other / rate:.1g}")
            found.append(RateLoss(arm, factor, lost, estimate, estimate.mean / gain, diverged))
    return found


def _scores(
    results: Sequence[Result], arm: str, base: Sequence[Result], metric: Metric
) -> dict[float, tuple[Subjects, int]]:
    """By rate: the score of each subject, the base's where a training diverged, and how many did."""
    found: dict[float, tuple[Subjects, int]] = {}
    mine = [result for result in results if result["arm"] == arm]
    for rate in sorted({result["learning_rate"] for result in mine}):
        of_rate = [result for result in mine if result["learning_rate"] == rate]
        found[rate] = scores_or_base(of_rate, base, metric)
    return found


def compare_losses(losses: Sequence[RateLoss], factor: float, reference: str) -> list[Comparison]:
    """The loss of every other method at one factor less that of ``reference``, paired by subject, corrected by Holm.

    Raises:
        ValueError: the reference was not run at this factor.
    """
    at = {loss.arm: loss.by_subject for loss in losses if loss.factor == factor}
    if reference not in at:
        raise ValueError(f"{reference} has no results at {factor:g} times its rate")
    return compare(at, [(arm, reference) for arm in at if arm != reference])


def write_losses(
    folder: Path,
    results: Sequence[Result],
    tuned: Mapping[str, float],
    metric: Metric,
    factor: float,
    reference: str,
) -> str:
    """Write ``losses.json`` and ``losses.md`` into ``folder`` and return the tables.

    Raises:
        ValueError: a method was not run at its rate, or the reference not at the factor.
    """
    losses = rate_losses(results, tuned, metric)
    comparisons = compare_losses(losses, factor, reference)
    text = f"{losses_table(losses, tuned, metric)}\n{loss_comparisons_table(comparisons, factor, metric)}"
    content = {
        "score": metric.key,
        "tuned": dict(tuned),
        "losses": losses,
        "factor": factor,
        "comparisons": comparisons,
    }
    write_text(folder / "losses.json", json.dumps(content, indent=1, default=asdict))
    write_text(folder / "losses.md", text)
    return text


def losses_table(losses: Sequence[RateLoss], tuned: Mapping[str, float], metric: Metric) -> str:
    """One row per method: its loss at each factor, mean and interval, and the share of the gain."""
    factors = sorted({loss.factor for loss in losses if loss.factor != 1})
    rows = []
    for arm, rate in tuned.items():
        mine = {loss.factor: loss for loss in losses if loss.arm == arm}
        cells = [
            f"{format_difference(mine[f].mean)}, {mine[f].share:.0%}"
            + (f" ({mine[f].diverged} diverged)" if mine[f].diverged else "")
            if f in mine
            else ""
            for f in factors
        ]
        rows.append([arm, f"{rate:g}", *cells])
    heads = ["method", "r*", *(f"× {factor:g}" for factor in factors)]
    table = markdown_table(heads, rows)
    return f"Loss of {metric.title} at multiples of r*, with the share of the gain:\n\n{table}"


def loss_comparisons_table(found: Sequence[Comparison], factor: float, metric: Metric) -> str:
    """How much more each method loses than the reference."""
    heads = ["method", "minus", f"loss of {metric.title} at × {factor:g}, 95 % interval", "p (Holm)", "subjects", ""]
    rows = [
        [
            each.arm,
            each.rival,
            *comparison_cells(each),
        ]
        for each in found
    ]
    return markdown_table(heads, rows)
