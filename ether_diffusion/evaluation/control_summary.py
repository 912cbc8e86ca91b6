"""What a study of controls found, in numbers: its results, by rate and at the best one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.files import write_text

Result = dict[str, Any]
"""What one training scored at one of its steps."""
OUTLINE = "study.json"
RESULTS = "results"
PAIRS = "pairs"
"""Names in a study's folder."""
FIRST = "miou"
"""The score by which rates are chosen and arms are ordered."""


@dataclass(frozen=True)
class Setting:
    """An arm at one rate.

    Attributes:
        arm: its name.
        rate: the value of the setting that is varied, None where none is.
        steps: the results by steps, ascending; a result for each seed.
    """

    arm: str
    rate: float | None
    steps: dict[int, list[Result]]

    @property
    def last(self) -> list[Result]:
        """The results of its last step."""
        return next(reversed(self.steps.values()))

    @property
    def counts(self) -> tuple[int, int]:
        """Trained parameters of the adapter, and of the encoder or ControlNet."""
        counts = dict(self.last[0]["trained_parameters"])
        control = counts.pop("control_encoder", 0) + counts.pop("controlnet_weights", 0)
        return sum(counts.values()), control

    @property
    def label(self) -> str:
        """Its rate as text."""
        return "" if self.rate is None else f"{self.rate:g}"


def write_outline(folder: Path, keys: Sequence[str], data: Path | None) -> None:
    """Write ``study.json``: the keys of all jobs, and where the pairs are if not in the folder itself."""
    outline = {"jobs": list(keys), "data": PAIRS if data is None else str(data.resolve())}
    write_text(folder / OUTLINE, json.dumps(outline, indent=1))


def pairs_of(folder: Path) -> Path:
    """Where the pairs of a study are."""
    return folder / str(json.loads((folder / OUTLINE).read_text())["data"])


def read_results(folder: Path) -> dict[str, list[Result]]:
    """The results of every job of a study by its key, by ascending steps; nothing of those not done.

    Raises:
        FileNotFoundError: the folder is not a study's.
    """
    keys = json.loads((folder / OUTLINE).read_text())["jobs"]
    root = folder / RESULTS
    return {key: [json.loads(path.read_text()) for path in sorted((root / key).glob("*.json"))] for key in keys}


def settings_of(results: dict[str, list[Result]]) -> list[Setting]:
    """Every arm at every rate of which something was scored, the arms in their order, by ascending rates."""
    found: dict[tuple[str, float | None], dict[int, list[Result]]] = {}
    for rows in results.values():
        for row in rows:
            if "scores" in row:
                found.setdefault((row["arm"], row["rate"]), {}).setdefault(row["steps"], []).append(row)
    arms = list(dict.fromkeys(arm for arm, _ in found))
    order = sorted(found, key=lambda key: (arms.index(key[0]), key[1] or 0.0))
    return [Setting(*key, dict(sorted(found[key].items()))) for key in order]


def finished(results: dict[str, list[Result]]) -> list[Setting]:
    """The settings that got to the study's last step, with the seeds that did; none of which a seed diverged."""
    last = max((row["steps"] for rows in results.values() for row in rows), default=0)
    diverged = {(row["arm"], row["rate"]) for rows in results.values() for row in rows if "diverged" in row}
    return [s for s in settings_of(results) if last in s.steps and (s.arm, s.rate) not in diverged]


def best_of_arms(settings: Sequence[Setting]) -> dict[str, Setting]:
    """Of every arm the one of the finished settings with the highest mIoU, by ascending mIoU."""
    best: dict[str, Setting] = {}
    for setting in settings:
        known = best.get(setting.arm)
        if known is None or mean(setting.last) > mean(known.last):
            best[setting.arm] = setting
    return dict(sorted(best.items(), key=lambda item: mean(item[1].last)))


def mean(rows: Sequence[Result], key: str = FIRST) -> float:
    """A score, its mean over the seeds and the sample numbers."""
    return statistics.fmean(row["scores"][key]["mean"] for row in rows)


def spread(rows: Sequence[Result], key: str = FIRST) -> float | None:
    """Its standard deviation over the seeds; of a single seed over the sample numbers, None where there is one."""
    if len(rows) > 1:
        return statistics.stdev(row["scores"][key]["mean"] for row in rows)
    found = rows[0]["scores"][key]["spread"]
    return None if found is None else float(found)


def unfinished(results: dict[str, list[Result]]) -> dict[str, list[str]]:
    """What is not in the tables, and why: jobs that were not begun, and trainings that diverged."""
    told = {
        "not done yet": [key for key, rows in results.items() if not rows],
        "diverged": [
            f"{key} at step {row['steps']}" for key, rows in results.items() for row in rows if "diverged" in row
        ],
    }
    return {what: names for what, names in told.items() if names}
