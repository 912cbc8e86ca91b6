"""What a study of controls found: its results by rate and at the best one, and whether one method is better.

The unit is the training: methods are compared within each seed that both have, and the interval is over the seeds.
Pairs of one training are no units, since another seed changes what a method reaches on all of them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ether_diffusion.evaluation.runner import RESULTS, why_missing
from ether_diffusion.evaluation.statistics import Comparison, compare
from ether_diffusion.files import write_text
from ether_diffusion.metrics.control import CLIP_T, FID, KID
from ether_diffusion.metrics.control_tasks import Segmentation
from ether_diffusion.page.text import number
from ether_diffusion.reading import read_json

OUTLINE = "study.json"
PAIRS = "pairs"
DIFFERENCES = "differences.json"
"""Names in a study's folder."""
MEASURES = {measure.key: measure for measure in (*Segmentation.measures, FID, KID, CLIP_T)}
"""What is scored; by the first of them rates are chosen and arms are ordered."""
MIOU = next(iter(MEASURES))

ControlResult = dict[str, Any]
"""What one training scored at one of its steps."""


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
    steps: dict[int, list[ControlResult]]

    @property
    def last(self) -> list[ControlResult]:
        """The results of its last step."""
        return next(reversed(self.steps.values()))

    @property
    def seeds(self) -> list[int]:
        """Those of its last step."""
        return [row["seed"] for row in self.last]

    def with_seeds(self, seeds: set[int]) -> Setting:
        """The same with these seeds only."""
        chosen = {step: [row for row in rows if row["seed"] in seeds] for step, rows in self.steps.items()}
        return Setting(self.arm, self.rate, chosen)

    @property
    def counts(self) -> tuple[int, int]:
        """Trained parameters of the adapter, and of the encoder or ControlNet."""
        counts = dict(self.last[0]["trained_parameters"])
        control = counts.pop("control_encoder", 0) + counts.pop("controlnet_weights", 0)
        return sum(counts.values()), control

    @property
    def label(self) -> str:
        """Its rate as text."""
        return number(self.rate, "g")


@dataclass(frozen=True)
class Findings:
    """The results of a study, finished or not.

    Attributes:
        folder: of the study.
        data: where its pairs are.
        last_step: the length of its trainings.
        results: of every job by its key, by ascending steps; nothing of those not begun.
    """

    folder: Path
    data: Path
    last_step: int
    results: dict[str, list[ControlResult]]

    @cached_property
    def scored(self) -> list[Setting]:
        """Every arm at every rate of which something was scored, the arms in their order, by ascending rates."""
        found: dict[tuple[str, float | None], dict[int, list[ControlResult]]] = {}
        for row in self._rows:
            if "scores" in row:
                found.setdefault((row["arm"], row["rate"]), {}).setdefault(row["steps"], []).append(row)
        arms = list(dict.fromkeys(arm for arm, _ in found))
        order = sorted(found, key=lambda key: (arms.index(key[0]), key[1] or 0.0))
        return [Setting(*key, dict(sorted(found[key].items()))) for key in order]

    @cached_property
    def finished(self) -> list[Setting]:
        """The settings that got to the last step, all with the same seeds: those that every one of them has.

        A rate at which a seed diverged is left out.
        """
        whole = [s for s in self.scored if self.last_step in s.steps and (s.arm, s.rate) not in self.diverged]
        shared = set.intersection(*(set(s.seeds) for s in whole)) if whole else set()
        return [s.with_seeds(shared) for s in whole] if shared else []

    @cached_property
    def best(self) -> dict[str, Setting]:
        """Of every arm the finished setting with the highest mIoU, by ascending mIoU."""
        best: dict[str, Setting] = {}
        for setting in self.finished:
            if setting.arm not in best or _rank(setting) > _rank(best[setting.arm]):
                best[setting.arm] = setting
        return dict(sorted(best.items(), key=lambda item: _rank(item[1])))

    @property
    def compared(self) -> dict[str, list[Any]]:
        """What every arm of ``best`` stands for: its rate, and the seeds with their scores."""
        return {
            arm: [setting.rate, *([row["seed"], row["scores"][MIOU]["mean"]] for row in setting.last)]
            for arm, setting in self.best.items()
        }

    @property
    def left_out(self) -> list[str]:
        """The jobs that are not in ``finished``, each with the reason."""
        used = {(s.arm, s.rate, seed) for s in self.finished for seed in s.seeds}
        told: list[str] = []
        for key, rows in self.results.items():
            last = rows[-1] if rows else {}
            if not rows:
                told.append(why_missing(self.folder, key))
            elif "diverged" in last:
                told.append(f"{key} (diverged, {last['diverged']}, so that its rate is left out)")
            elif last["steps"] < self.last_step:
                told.append(f"{key} (at step {last['steps']} of {self.last_step})")
            elif (last["arm"], last["rate"]) in self.diverged:
                told.append(f"{key} (another seed diverged)")
            elif (last["arm"], last["rate"], last["seed"]) not in used:
                told.append(f"{key} (others do not have this seed yet)")
        return told

    @property
    def _rows(self) -> list[ControlResult]:
        return [row for rows in self.results.values() for row in rows]

    @property
    def diverged(self) -> set[tuple[str, float | None]]:
        """Arms and rates at which a seed diverged."""
        return {(row["arm"], row["rate"]) for row in self._rows if "diverged" in row}


def write_outline(folder: Path, keys: Sequence[str], last_step: int, data: Path | None) -> None:
    """Write ``study.json``: the keys of all jobs, their last step, and where the pairs are if not in the folder."""
    outline = {"jobs": list(keys), "steps": last_step, "data": PAIRS if data is None else str(data.resolve())}
    write_text(folder / OUTLINE, json.dumps(outline, indent=1))


class _Outline(TypedDict):
    """``study.json``."""

    jobs: list[str]
    steps: int
    data: str


class _Score(TypedDict):
    """One score of a result."""

    mean: float | None
    spread: float | None


class _Recorded(TypedDict):
    """What a result has."""

    arm: str
    rate: float | None
    seed: int
    steps: int
    identity: NotRequired[str]
    diverged: NotRequired[str]
    scores: NotRequired[dict[str, _Score]]
    trained_parameters: NotRequired[dict[str, int]]
    judges: NotRequired[dict[str, dict[str, str]]]
    base_hash: NotRequired[dict[str, str | None]]


def read_result(path: Path) -> ControlResult:
    """One result's file.

    Raises:
        DamagedFileError: it is no result; the message names it. Without the file its job is done again.
    """
    found: ControlResult = read_json(path, _Recorded)
    return found


def read_findings(folder: Path) -> Findings:
    """Read a study's folder.

    Raises:
        DamagedFileError: a file of it is damaged.
        FileNotFoundError: the folder is not a study's.
    """
    outline = read_json(folder / OUTLINE, _Outline)
    results = {
        key: [read_result(path) for path in sorted((folder / RESULTS / key).glob("*.json"))] for key in outline["jobs"]
    }
    return Findings(folder, folder / outline["data"], outline["steps"], results)


def mean(rows: Sequence[ControlResult], key: str = MIOU) -> float:
    """A score, its mean over the seeds and the sample numbers; NaN where there is none."""
    values = [row["scores"][key]["mean"] for row in rows]
    return math.nan if None in values else statistics.fmean(values)


def spread(rows: Sequence[ControlResult], key: str = MIOU) -> float | None:
    """Its standard deviation over the seeds; of a single seed over the sample numbers, None where there is one."""
    if math.isnan(mean(rows, key)):
        return None
    if len(rows) > 1:
        return statistics.stdev(row["scores"][key]["mean"] for row in rows)
    found = rows[0]["scores"][key]["spread"]
    return None if found is None else float(found)


def _rank(setting: Setting) -> float:
    value = mean(setting.last)
    return -math.inf if math.isnan(value) else value


def differences(findings: Findings, against: Sequence[str]) -> list[Comparison]:
    """The mIoU of every arm minus that of each arm of ``against``, at the best rates, corrected for their number.

    Two arms of ``against`` are compared once, not in both directions, so that the correction counts them once.

    Args:
        findings: of the study.
        against: arms; those that are not finished are left out.
    """
    values = by_seed(findings)
    pairs: list[tuple[str, str]] = []
    for other in against:
        pairs += [(arm, other) for arm in values if other in values and arm != other and (other, arm) not in pairs]
    return compare(values, list(dict.fromkeys(pairs)))


def by_seed(findings: Findings) -> dict[str, dict[str, float]]:
    """MIoU of every arm at its best rate, by the seed; seeds without a score are left out."""
    values: dict[str, dict[str, float]] = {}
    for arm, setting in findings.best.items():
        means = {str(row["seed"]): row["scores"][MIOU]["mean"] for row in sorted(setting.last, key=itemgetter("seed"))}
        values[arm] = {seed: mean for seed, mean in means.items() if mean is not None}
    return values


def write_differences(study: Path, against: Sequence[str]) -> list[Comparison]:
    """Write ``differences.json`` of a study's folder; return the comparisons.

    What another process finishes meanwhile is taken in. The JSON has for every arm its rate and its score by seed
    (``arms``), and the ``comparisons``: ``arm``, ``rival``, the ``seeds`` that both have, the mean ``difference`` over
    them, the ends ``low`` and ``high`` of its 95 % interval, ``p``, and ``p_holm``. Of one seed the last four are null.

    Args:
        study: its folder.
        against: see :func:`differences`.
    """
    while True:
        findings = read_findings(study)
        found = differences(findings, against)
        if read_findings(study).compared == findings.compared:
            break
    values = by_seed(findings)
    content: dict[str, Any] = {
        "measure": MIOU,
        "arms": {arm: {"rate": findings.best[arm].rate, "by_seed": of_arm} for arm, of_arm in values.items()},
        "comparisons": [_line(each, values) for each in found],
    }
    write_text(study / DIFFERENCES, json.dumps(content, indent=1))
    return found


def _line(found: Comparison, values: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A comparison in :data:`DIFFERENCES`."""
    estimate = found.difference
    return {
        "arm": found.arm,
        "rival": found.rival,
        "seeds": [int(seed) for seed in values[found.arm] if seed in values[found.rival]],
        "difference": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "p": estimate.p,
        "p_holm": found.p_holm,
    }


class _Comparison(TypedDict):
    """What is read of a comparison."""

    rival: str


class _Differences(TypedDict):
    """:data:`DIFFERENCES`."""

    comparisons: list[_Comparison]


def read_differences(findings: Findings) -> list[Comparison]:
    """The comparisons that the study's :data:`DIFFERENCES` names, of the findings as they are now; none without it."""
    path = findings.folder / DIFFERENCES
    known = read_json(path, _Differences)["comparisons"] if path.is_file() else []
    return differences(findings, list(dict.fromkeys(each["rival"] for each in known)))
