"""Whether a method of a study of controls is better than another: differences with intervals over the pairs.

The methods drew under the same conditions from the same noise, so the pairs are resampled for all of them alike, and
the interval is that of the difference. It is over the pairs: of several seeds it takes their mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ether_diffusion.evaluation.control_summary import Setting
from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.metrics.control_tasks import ControlTask, Pair

RESAMPLES = 1000
STATISTICS = "statistics.npz"
DIFFERENCES = "differences.json"


def write_differences(
    folder: Path, best: Mapping[str, Setting], pairs: Sequence[Pair], task: ControlTask, against: Sequence[str]
) -> str:
    """Write the task's first measure of every arm minus that of each arm of ``against``; return it as a table.

    ``differences.md`` has the table, ``differences.json`` its numbers: difference, low and high by arm and other arm.

    Args:
        folder: of the study.
        best: every arm at its best rate.
        pairs: what was drawn.
        task: the judge.
        against: arms; those that are not in ``best`` are left out.
    """
    measure = task.measures[0]
    against = [arm for arm in against if arm in best]
    values = {
        arm: resampled(_of_seeds(folder, setting, pairs, task), task, measure.key)
        for arm, setting in tqdm(best.items(), desc="differences", unit="arm")
    }
    found = {
        arm: {other: _interval(mine - values[other]) for other in against if other != arm}
        for arm, mine in sorted(values.items(), key=lambda item: item[1][0])
    }
    heads = [f"{measure.title} − that of {other}" for other in against]
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for arm, others in found.items():
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*others[other]) if other in others else "" for other in against]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    write_text(folder / DIFFERENCES, json.dumps(found, indent=1))
    write_text(folder / "differences.md", text)
    return text


def _of_seeds(folder: Path, setting: Setting, pairs: Sequence[Pair], task: ControlTask) -> Tensor:
    """The statistics of a setting's last step, (pairs, samples of all seeds, …)."""
    seeds = [
        pair_statistics(folder / row["folder"], pairs[: row["pairs"]], row["samples_per_pair"], task)
        for row in setting.last
    ]
    return torch.cat(seeds, dim=1)


def pair_statistics(folder: Path, pairs: Sequence[Pair], samples: int, task: ControlTask) -> Tensor:
    """The task's statistic of every picture, (pairs, samples, …); kept in the folder, since judging takes a while.

    Raises:
        FileNotFoundError: a picture is gone.
        ValueError: a picture cannot be read, or has another size than its map.
    """
    cache = folder / STATISTICS
    if cache.is_file():
        with np.load(cache) as known:
            found = torch.from_numpy(known["statistics"])
        if found.shape[:2] == (len(pairs), samples):
            return found
    pictures = [[folder / f"{index:05d}-{number}.png" for number in range(samples)] for index in range(len(pairs))]
    compared = task.compare(pairs, pictures)
    found = torch.stack([torch.stack([each.statistic for each in of_pair]) for of_pair in compared])
    with atomic_path(cache) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, statistics=found.numpy())  # maps of many classes are mostly zeros
    return found


def resampled(statistics: Tensor, task: ControlTask, key: str) -> np.ndarray:
    """A score of the pairs as they are, then of :data:`RESAMPLES` draws of as many pairs with replacement.

    The same draws for every method. The score is the mean over the samples, as in the study's table.

    Args:
        statistics: (pairs, samples, …).
        task: whose scores they add up to.
        key: of the score.

    Returns:
        (1 + RESAMPLES,) fp64.
    """
    count = len(statistics)
    draws = np.random.default_rng(0).multinomial(count, [1 / count] * count, RESAMPLES)
    flat = statistics.flatten(1).double()
    scores = []
    for weights in [np.ones(count), *draws]:
        totals = (torch.from_numpy(weights).double() @ flat).view(statistics.shape[1:])
        scores.append(np.mean([task.scores(total.to(statistics.dtype))[key] for total in totals]))
    return np.array(scores)


def _interval(differences: np.ndarray) -> tuple[float, float, float]:
    low, high = np.percentile(differences[1:], [2.5, 97.5])
    return float(differences[0]), float(low), float(high)
