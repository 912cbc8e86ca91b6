"""The tables of the study of language, and the rule that chooses learning rates: all made from the jobs' records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from ether_diffusion.evaluation.statistics import Estimate, against_leader, mean_interval
from ether_diffusion.page.text import interval, markdown_table, number

TITLES = {"ether": "ETHER", "ether_plus": "ETHER+", "lora": "LoRA", "full": "full finetuning"}
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Learning rates that a study tries: half decades."""


class JobRecord(TypedDict):
    """What a job found.

    Attributes:
        part: "tuning", on which rates are chosen, or "test".
        method: a key of ``TITLES``.
        learning_rate: of the job.
        task: number of the permutation.
        parameters: trained numbers.
        shifted: share of right answers to the questions that the task changed.
        retained: the same of the base's other questions, a mean over ``by_kind``.
        by_kind: of each other kind.
        seconds: of the job.
    """

    part: str
    method: str
    learning_rate: float
    task: int
    parameters: int
    shifted: float
    retained: float
    by_kind: dict[str, float]
    seconds: float


class BaseRecord(TypedDict):
    """What the base answers right: of every kind of question, and on average of those that no task changes."""

    parameters: int
    by_kind: dict[str, float]
    retained: float
    seconds: float


class Results(TypedDict):
    """A whole study, as it lies in ``docs/results/language.json``."""

    settings: dict[str, object]
    versions: dict[str, str]
    base: BaseRecord
    jobs: list[JobRecord]


def score(job: JobRecord) -> float:
    """What decides: the mean of what is learnt and what is retained."""
    return (job["shifted"] + job["retained"]) / 2


def mean_scores(jobs: Sequence[JobRecord], method: str) -> dict[float, float]:
    """Mean score on the tuning tasks at each rate of a method, the lowest rate first."""
    found: dict[float, list[float]] = {}
    for job in jobs:
        if job["part"] == "tuning" and job["method"] == method:
            found.setdefault(job["learning_rate"], []).append(score(job))
    return {rate: sum(values) / len(values) for rate, values in sorted(found.items())}


def best_rate(jobs: Sequence[JobRecord], method: str) -> float:
    """The rate with the highest mean score on the tuning tasks; of equal ones the lowest."""
    scores = mean_scores(jobs, method)
    return max(scores, key=lambda rate: scores[rate])


def further_rate(jobs: Sequence[JobRecord], method: str, limit: int) -> float | None:
    """The next rate outwards, if the best one has no neighbour there; None if it has both, or ``limit`` were tried."""
    tried = list(mean_scores(jobs, method))
    best = best_rate(jobs, method)
    place = LADDER.index(best)
    if len(tried) >= limit or tried[0] < best < tried[-1]:
        return None
    outwards = place - 1 if best == tried[0] else place + 1
    return LADDER[outwards] if 0 <= outwards < len(LADDER) else None


def rates_table(results: Results) -> str:
    """Score on the tuning tasks at every rate, the chosen one in bold."""
    lines = []
    for method in _methods(results):
        scores, best = mean_scores(results["jobs"], method), best_rate(results["jobs"], method)
        cells = [
            f"**{rate:g}: {mean:.3f}**" if rate == best else f"{rate:g}: {mean:.3f}" for rate, mean in scores.items()
        ]
        lines.append([TITLES[method], ", ".join(cells)])
    return markdown_table(["method", "learning rate: mean of both, tuning tasks"], lines, text_columns=(0, 1))


def methods_table(results: Results) -> str:
    """The methods on the test tasks, the best first, and the base."""
    jobs = [job for job in results["jobs"] if job["part"] == "test"]
    rows = []
    for method in _methods(results):
        own = [job for job in jobs if job["method"] == method]
        if own:
            kinds = [score, lambda job: job["shifted"], lambda job: job["retained"]]
            scores = [mean_interval(map(kind, own)) for kind in kinds]
            rate, size = f"{own[0]['learning_rate']:g}", f"{own[0]['parameters']:,}"
            rows.append((scores[0].mean, [TITLES[method], rate, size, *map(_cell, scores)]))
    lines = [cells for _, cells in sorted(rows, key=lambda row: -row[0])]
    base = results["base"]
    lines.append(["*base*", "", f"{base['parameters']:,}", "", "", number(base["retained"])])
    heads = ["method", "learning rate", "trained numbers", "mean of both", "shifted task", "retained"]
    return markdown_table(heads, lines)


def compared_table(results: Results) -> str:
    """The method with the highest score against each of the others, paired by task."""
    arms = {
        TITLES[method]: {
            str(job["task"]): score(job) for job in results["jobs"] if job["part"] == "test" and job["method"] == method
        }
        for method in _methods(results)
    }
    lines = [
        [
            f"{each.arm} − {each.rival}",
            _cell(each.difference),
            number(each.p_holm, ".3f"),
            "separated" if each.separated else "not separated",
        ]
        for each in against_leader(arms)
    ]
    return markdown_table(["mean of both", "difference", "p (Holm)", "at 5 %"], lines, text_columns=(0, 3))


def tables(results: Results) -> str:
    """All three, as the page has them."""
    return "\n".join([methods_table(results), compared_table(results), rates_table(results)])


def _methods(results: Results) -> list[str]:
    found = {job["method"] for job in results["jobs"]}
    return [method for method in TITLES if method in found]


def _cell(value: Estimate) -> str:
    return interval(value.mean, value.low, value.high)
