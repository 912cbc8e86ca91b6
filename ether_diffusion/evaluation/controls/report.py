"""The page of control accuracy, offline and in one file: scores, the best and worst pictures, classes, choices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ether_diffusion.files import write_text
from ether_diffusion.metrics.control import ControlScores
from ether_diffusion.metrics.control_tasks import ControlTask, Measure
from ether_diffusion.metrics.generated import Generated
from ether_diffusion.page.pictures import Picture, data_uri, thumbnail
from ether_diffusion.page.render import render
from ether_diffusion.page.text import decimals
from ether_diffusion.runs.report import short_path

EACH = 3
"""So many of the best, the median and the worst pairs are shown."""
MAX_SAMPLES = 4
THUMBNAIL = 256


@dataclass(frozen=True)
class ShownPair:
    """A pair in the page.

    Attributes:
        rank: best, median or worst.
        name: of the pair.
        prompt: of its pictures.
        score: the mean of its pictures' first measure.
        pictures: condition, original, samples.
        looks: what the judge sees in each of the samples; empty where that cannot be shown.
        values: every sample's own figure.
    """

    rank: str
    name: str
    prompt: str | None
    score: float
    pictures: list[Picture]
    looks: list[Picture]
    values: list[float | None]


def write_control_report(
    scores: ControlScores, control: Generated, generated: Path, task: ControlTask, title: str, output: Path
) -> Path:
    """Write the page atomically; return its path.

    Args:
        scores: of the pairs of ``control``.
        control: pairs and pictures.
        generated: the folder of the pictures.
        task: that they were scored by; it looks once more at what is shown.
        title: of the page.
        output: its path.
    """
    pairs = shown_pairs(scores, control, generated, task)
    page = render(
        Path(__file__).with_name("report.html.jinja"),
        {"number": partial(decimals, digits=3), "choice": _choice, "short": short_path},
        title=title,
        scores=scores,
        first=scores.measures[0],
        pairs=pairs,
        columns=max((len(pair.values) for pair in pairs), default=0),
        refused=control.refused,
    )
    write_text(output, page)
    return output


def shown_pairs(scores: ControlScores, control: Generated, generated: Path, task: ControlTask) -> list[ShownPair]:
    """The best, the median and the worst pairs, by the mean of their pictures' first measure."""
    measure = scores.measures[0]
    of_pairs: dict[str, list[float | None]] = {}
    for row in scores.rows:
        of_pairs.setdefault(row["pair"], []).append(row[measure.key])
    shown = []
    for rank, number in ranked([_mean(of_pairs[pair.name]) for pair in control.pairs], measure):
        pair, samples = control.pairs[number], control.samples[number][:MAX_SAMPLES]
        paths = [generated / sample.file_name for sample in samples]
        condition, looks = task.looks(pair, paths)
        pictures = [
            Picture(None if condition is None else data_uri(condition, THUMBNAIL, True), "Condition", pair.name),
            Picture(thumbnail(Path(str(pair.original)), THUMBNAIL), "Original", pair.name),
        ]
        for sample, path in zip(samples, paths, strict=True):
            caption = sample.file_name if sample.seed is None else f"{sample.file_name}, seed {sample.seed}"
            pictures.append(Picture(thumbnail(path, THUMBNAIL), f"Generated {sample.file_name}", caption))
        seen = [
            Picture(data_uri(look, THUMBNAIL, True), f"What the judge sees in {sample.file_name}", sample.file_name)
            for look, sample in zip(looks, samples, strict=True)
            if look is not None
        ]
        values = of_pairs[pair.name]
        shown.append(
            ShownPair(
                rank, pair.name, samples[0].prompt or pair.prompt, _mean(values), pictures, seen, values[:MAX_SAMPLES]
            )
        )
    return shown


def ranked(values: Sequence[float], measure: Measure, each: int = EACH) -> list[tuple[str, int]]:
    """The numbers of the best, the median and the worst of the values, the best first; none twice, no NaN."""
    known = [number for number in range(len(values)) if not np.isnan(values[number])]
    order = sorted(known, key=lambda number: values[number], reverse=measure.higher_is_better)
    if len(order) <= 3 * each:
        third = -(-len(order) // 3)
        ranks = ["best"] * third + ["median"] * (len(order) - 2 * third) + ["worst"] * third
        return list(zip(ranks, order, strict=False))
    middle = (len(order) - each) // 2
    parts = {"best": order[:each], "median": order[middle : middle + each], "worst": order[-each:]}
    return [(rank, number) for rank, numbers in parts.items() for number in numbers]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _choice(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
