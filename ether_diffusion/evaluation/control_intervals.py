"""Whether a method of a study of controls is better than another: differences with intervals over the pairs.

The methods drew under the same conditions from the same noise, so the pairs are resampled for all of them alike, and
the interval is that of the difference. It is over the pairs: of several seeds it takes their mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ether_diffusion.evaluation.control_summary import Findings, Setting, read_findings
from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.metrics.control_tasks import ControlTask, Pair

RESAMPLES = 1000
STATISTICS = "statistics.npz"
DIFFERENCES = "differences.json"


def write_differences(study: Path, pairs: Sequence[Pair], task: ControlTask, against: Sequence[str]) -> str:
    """Write the task's first measure of every arm minus that of each arm of ``against``; return it as a table.

    Every arm is at its best rate. ``differences.md`` has the table; ``differences.json`` has the rate and the seeds of
    every arm (``compared``), and difference, low and high by arm and other arm (``differences``). What another process
    finishes meanwhile is taken in.

    Args:
        study: its folder.
        pairs: what was drawn.
        task: the judge.
        against: arms; those that are not finished are left out.
    """
    while True:
        findings = read_findings(study)
        found = _differences(findings, pairs, task, against)
        if read_findings(study).compared == findings.compared:
            break
    others = [arm for arm in against if arm in found]
    lines = [f"| method | {' | '.join(f'{task.measures[0].title} − that of {other}' for other in others)} |"]
    lines.append(f"|---|{'---|' * len(others)}")
    for arm, values in found.items():
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*values[other]) if other in values else "" for other in others]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    content = {"compared": findings.compared, "differences": found}
    write_text(study / DIFFERENCES, json.dumps(content, indent=1))
    write_text(study / "differences.md", text)
    return text


def read_differences(findings: Findings) -> dict[str, dict[str, list[float]]]:
    """What :func:`write_differences` wrote, if it is of these findings; nothing otherwise."""
    path = findings.folder / DIFFERENCES
    known = json.loads(path.read_text()) if path.is_file() else {}
    return known["differences"] if known.get("compared") == findings.compared else {}


def _differences(
    findings: Findings, pairs: Sequence[Pair], task: ControlTask, against: Sequence[str]
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By arm and other arm the difference, low and high; the arms by ascending scores."""
    values = {
        arm: resampled(_of_seeds(findings.folder, setting, pairs, task), task, task.measures[0].key)
        for arm, setting in tqdm(findings.best.items(), desc="differences", unit="arm")
    }
    return {
        arm: {other: _interval(mine - values[other]) for other in against if other in values and other != arm}
        for arm, mine in sorted(values.items(), key=lambda item: item[1][0])
    }


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
