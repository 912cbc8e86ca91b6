"""Control accuracy: how well pictures keep to their conditions, over a whole dataset and its several samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ether_diffusion.metrics.backbones import BATCH, AnytorchClip, Backbone, Clip, Picture
from ether_diffusion.metrics.control_tasks import ControlTask, Measure, Pair, Row
from ether_diffusion.metrics.distribution import distances, too_few
from ether_diffusion.metrics.fidelity import prompt_similarity
from ether_diffusion.metrics.scoring import library_versions, text_features

CLIP_T = Measure("clip_t", "CLIP-T")
FID = Measure("fid", "FID", higher_is_better=False)
KID = Measure("kid", "KID", higher_is_better=False)
DISTRIBUTIONS = (FID, KID)
BETWEEN = "originals of the pairs between"

Score = dict[str, Any]


@dataclass
class ControlScores:
    """What :func:`score_control` finds.

    Attributes:
        task: the name of the task.
        measures: the figures that are in ``scores``, in order.
        scores: of every measure the ``mean`` over the sample numbers of the dataset's score, its standard deviation
            ``spread`` (None for one number), the scores ``by_number``, and ``overall``: of all pictures as one set;
            None where there was nothing to take a score of.
        originals: the same measures of the originals held against the same conditions: the most that a generator can
            be expected to reach with this judge. Not there where the conditions were computed from them. FID and KID
            are those of the originals of the scored pairs against the same real images: the least to be expected.
        rows: one per picture.
        classes: of maps, over all pictures.
        pairs: how many.
        pictures: how many.
        samples_per_pair: that all pairs have.
        conditions: how many conditions were ``given``, and how many ``computed`` from the original.
        judges: the models, each with its weights and preprocessing.
        choices: all else that the figures depend on.
        warnings: what to know before believing them.
        libraries: versions.
    """

    task: str
    measures: list[Measure]
    scores: dict[str, Score]
    originals: dict[str, float | None]
    rows: list[Row]
    classes: list[dict[str, Any]]
    pairs: int
    pictures: int
    samples_per_pair: int
    conditions: dict[str, int]
    judges: dict[str, dict[str, str]]
    choices: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    libraries: dict[str, str] = field(default_factory=library_versions)

    def mean(self, key: str) -> float:
        """A score by its key, NaN where there is none: ``scores.mean("miou")``."""
        found = self.scores[key]["mean"]
        return math.nan if found is None else float(found)


def score_control(
    pairs: Sequence[Pair],
    samples: Sequence[Sequence[Picture]],
    task: ControlTask,
    clip: Clip | AnytorchClip | None = None,
    features: Backbone | None = None,
    prompts: Sequence[Sequence[str | None]] | None = None,
    unrelated: Sequence[Picture] | None = None,
    kid_subset_size: int | None = None,
    originals: bool = True,
    show: bool = False,
) -> ControlScores:
    """Score the generated pictures of every pair.

    Args:
        pairs: originals with their conditions.
        samples: of each pair its pictures, images or paths. The first of all pairs are one dataset with one score, the
            second another; if pairs have not equally many, so many datasets as all have a picture for.
        task: how a picture is held against its condition.
        clip: for CLIP-T; None for none.
        features: whose features FID and KID compare; None for neither. They are left out, with a warning, where there
            are too few pictures: see :func:`~ether_diffusion.metrics.distribution.too_few`.
        unrelated: real images for FID and KID. Those that are the original of a pair, by path or as the same object,
            are passed over with a warning, since the pictures were drawn for them. Without ``unrelated`` the pictures
            of every second pair, from the first on, are held against the originals of the pairs between.
        prompts: of every picture; None for those of the pairs. Pictures without one have no CLIP-T.
        kid_subset_size: see :func:`~ether_diffusion.metrics.distribution.kernel_distance`.
        originals: whether to score the originals, too.
        show: whether to show progress.

    Raises:
        ValueError: there are no pairs, a pair has no picture, or a condition does not fit; the message names the pair.
        UnreadableImageError: a file is no whole picture.
    """
    if not pairs or len(pairs) != len(samples):
        raise ValueError(f"every one of {len(pairs)} pairs needs its pictures, {len(samples)} lists of them are given")
    if lonely := [pair.name for pair, of_pair in zip(pairs, samples, strict=True) if not of_pair]:
        raise ValueError(f"{len(lonely)} pairs have no picture: {', '.join(lonely[:8])}")
    numbers = min(map(len, samples))
    rows, totals = _compare_all(pairs, samples, task, numbers, show)
    everything = _sum(totals)
    measures, scores = list(task.measures), _spread([task.scores(t) for t in totals[:numbers]], task.scores(everything))
    found = ControlScores(
        task=task.name,
        measures=measures,
        scores=scores,
        originals={},
        rows=rows,
        classes=task.details(everything),
        pairs=len(pairs),
        pictures=len(rows),
        samples_per_pair=numbers,
        conditions={
            "given": sum(map(task.from_file, pairs)),
            "computed": sum(not task.from_file(pair) for pair in pairs),
        },
        judges=dict(task.judges),
        choices=dict(task.choices),
    )
    if max(map(len, samples)) > numbers:
        found.warnings.append(
            f"Not all pairs have equally many pictures: the spread is of the first {numbers}, which all have."
        )
    if originals:
        _score_originals(found, pairs, task, show)
    if clip is not None:
        _score_prompts(found, pairs, samples, clip, prompts, show)
    if features is not None:
        _score_distributions(found, pairs, samples, features, unrelated, kid_subset_size, originals, show)
    return found


def _compare_all(
    pairs: Sequence[Pair], samples: Sequence[Sequence[Picture]], task: ControlTask, numbers: int, show: bool
) -> tuple[list[Row], list[Tensor]]:
    """A row per picture, and the sum of the statistics of every sample number."""
    rows: list[Row] = []
    totals: list[Tensor] = []
    at_a_time = max(1, BATCH // numbers)
    for start in tqdm(range(0, len(pairs), at_a_time), desc=task.name, unit="batch", disable=not show):
        part = slice(start, start + at_a_time)
        compared = task.compare(pairs[part], samples[part])
        for pair, pictures, of_pair in zip(pairs[part], samples[part], compared, strict=True):
            for number, (picture, (row, statistic)) in enumerate(zip(pictures, of_pair, strict=True)):
                file = {"file": str(picture)} if isinstance(picture, Path) else {}
                rows.append({"pair": pair.name, "number": number} | file | row)
                while len(totals) <= number:
                    totals.append(torch.zeros_like(statistic))
                totals[number] += statistic
    return rows, totals


def _sum(totals: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(totals)).sum(0)


def _spread(by_number: Sequence[dict[str, float]], overall: dict[str, float]) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    for key, value in overall.items():
        values = [each[key] for each in by_number]
        known = not any(map(math.isnan, values))
        scores[key] = {
            "mean": float(np.mean(values)) if known else None,
            "spread": float(np.std(values, ddof=1)) if known and len(values) > 1 else None,
            "overall": _or_none(value),
            "by_number": [_or_none(each) for each in values],
        }
    return scores


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _score_originals(found: ControlScores, pairs: Sequence[Pair], task: ControlTask, show: bool) -> None:
    """Hold the originals against the conditions that were given."""
    given = [pair for pair in pairs if task.from_file(pair)]
    if not given:
        return
    try:
        _, totals = _compare_all(given, [[pair.original] for pair in given], task, 1, show)
    except ValueError as error:
        found.warnings.append(f"The originals are not in the table: {error}.")
        return
    found.originals = {key: _or_none(value) for key, value in task.scores(totals[0]).items()}


def _score_prompts(
    found: ControlScores,
    pairs: Sequence[Pair],
    samples: Sequence[Sequence[Picture]],
    clip: Clip | AnytorchClip,
    prompts: Sequence[Sequence[str | None]] | None,
    show: bool,
) -> None:
    """Add CLIP-T to the rows and scores."""
    if prompts is None:
        prompts = [[pair.prompt] * len(of_pair) for pair, of_pair in zip(pairs, samples, strict=True)]
    said = [prompt for of_pair in prompts for prompt in of_pair]
    asked = [number for number, prompt in enumerate(said) if prompt is not None]
    found.judges["clip"] = clip.identity
    if len(asked) < len(said):
        found.warnings.append(f"{len(said) - len(asked)} of {len(said)} pictures have no prompt, and no CLIP-T.")
    if not asked:
        return
    pictures = [picture for of_pair in samples for picture in of_pair]
    seen = clip.image_features([pictures[number] for number in asked], "CLIP-T" if show else None)
    cosines = prompt_similarity(seen, text_features(clip, [str(said[number]) for number in asked])).double()
    for number, cosine in zip(asked, cosines.tolist(), strict=True):
        found.rows[number] |= {"prompt": said[number], CLIP_T.key: cosine}
    by_number = [
        {CLIP_T.key: float(np.mean([row[CLIP_T.key] for row in found.rows if _is(row, number)] or [math.nan]))}
        for number in range(found.samples_per_pair)
    ]
    found.scores |= _spread(by_number, {CLIP_T.key: cosines.mean().item()})
    found.measures.append(CLIP_T)
    if found.originals:
        of_pairs = [pair for pair in pairs if pair.prompt is not None]
        if of_pairs:
            real = clip.image_features([pair.original for pair in of_pairs])
            texts = text_features(clip, [str(pair.prompt) for pair in of_pairs])
            found.originals[CLIP_T.key] = prompt_similarity(real, texts).mean().item()


def _is(row: Row, number: int) -> bool:
    return row["number"] == number and CLIP_T.key in row


def _score_distributions(
    found: ControlScores,
    pairs: Sequence[Pair],
    samples: Sequence[Sequence[Picture]],
    features: Backbone,
    others: Sequence[Picture] | None,
    subset_size: int | None,
    originals: bool,
    show: bool,
) -> None:
    """Add FID and KID of the pictures against real images that they were not drawn for, where there are enough."""
    drawn, real_images = _unrelated(pairs, samples, others)
    if own := (len(pairs) // 2 if others is None else len(others)) - len(real_images):
        found.warnings.append(
            f"FID and KID leave out {own:,} of the real images: the scored pictures were drawn for them."
        )
    numbers = [number for _, of_pair in drawn for number in range(len(of_pair))]
    missing = too_few(len(real_images), len(numbers))
    if len(missing) < len(DISTRIBUTIONS):
        real = features.raw_features(real_images, "real images" if show else None)
        seen = features.raw_features([picture for _, each in drawn for picture in each], "FID, KID" if show else None)
        missing = too_few(len(real), len(seen), real.shape[1])
        by_number = [
            distances(real, seen[[place for place, each in enumerate(numbers) if each == number]], subset_size)
            for number in range(found.samples_per_pair)
        ]
        overall, floor = distances(real, seen, subset_size), {}
        if originals:
            floor = distances(real, features.raw_features([pair.original for pair, _ in drawn]), subset_size)
        for measure in DISTRIBUTIONS:
            if measure.key not in missing:
                found.measures.append(measure)
                values = [{measure.key: each[measure.key]} for each in by_number]
                found.scores |= _spread(values, {measure.key: overall[measure.key]})
                if not math.isnan(floor.get(measure.key, math.nan)):
                    found.originals[measure.key] = floor[measure.key]
                if any(math.isnan(each[measure.key]) for each in by_number):
                    found.warnings.append(
                        f"{measure.title} is of all samples as one set only: {len(drawn):,} pictures, one of each "
                        "pair, are too few."
                    )
        found.judges["features"] = features.identity
        of_pictures, of_real = ("", "other real images") if others is not None else (" of every second pair", BETWEEN)
        found.choices["FID and KID"] = (
            f"{len(seen):,} pictures{of_pictures} against {len(real):,} {of_real}; "
            "originals: those of the same pairs against the same images"
        )
    found.warnings += [f"{reason}." for reason in missing.values()]


def _unrelated(
    pairs: Sequence[Pair], samples: Sequence[Sequence[Picture]], others: Sequence[Picture] | None
) -> tuple[list[tuple[Pair, Sequence[Picture]]], list[Picture]]:
    """The pairs whose pictures FID and KID are of, and the real images, none of which is the original of such a pair.

    Without ``others`` the pairs are every second one, from the first on, and the images the originals of the pairs
    between.
    """
    drawn = list(zip(pairs, samples, strict=True))
    if others is None:
        drawn, others = drawn[::2], [pair.original for pair in pairs[1::2]]
    own = {_file_or_image(pair.original) for pair, _ in drawn}
    return drawn, [picture for picture in others if _file_or_image(picture) not in own]


def _file_or_image(picture: Picture) -> Path | int:
    """Equal for two paths of one file, and for one image in memory."""
    return picture.resolve() if isinstance(picture, Path) else id(picture)
