"""What the page of many runs shows: benchmark folders arm by arm, studies of controls, runs of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.evaluation.controls.findings import OUTLINE
from ether_diffusion.evaluation.controls.section import ControlSection, read_section
from ether_diffusion.evaluation.subjects.benchmark import JOBS
from ether_diffusion.evaluation.subjects.summary import (
    Metric,
    Result,
    all_results,
    arm_order,
    best_rates,
    primary,
    summarize,
)
from ether_diffusion.runs.record import Run, read_run


@dataclass(frozen=True)
class Benchmark:
    """A folder that ``eval/dreambench.py`` or ``eval.subject_fidelity`` wrote.

    Attributes:
        name: what tells it from the page's others.
        folder: absolute.
        results: one per job, or per subject of existing images.
        rows: of the summary: arms at their learning rates.
        missing: what is not in it, in words.
        judges: who scored.
    """

    name: str
    folder: Path
    results: list[Result]
    rows: list[dict[str, Any]]
    missing: list[str]
    judges: dict[str, dict[str, str]]

    @property
    def shown_arms(self) -> list[dict[str, Any]]:
        """Of every arm the row of :func:`best_rates`: what pictures and tables by subject are of."""
        return [row for row in best_rates([row for row in self.rows if row["images"]]) if row["scores"]]

    @property
    def primary(self) -> Metric:
        """The score that decides."""
        return primary(self.rows)

    @property
    def subjects(self) -> list[str]:
        """Of all results, in their order."""
        return list(dict.fromkeys(result["subject"] for result in self.results))

    def results_of(self, row: dict[str, Any], subject: str) -> list[Result]:
        """The results of an arm's row for one subject, a result per seed."""
        key = (row["arm"], row["learning_rate"], subject)
        return [r for r in self.results if (r["arm"], r["learning_rate"], r["subject"]) == key]

    def picture(self, result: Result, file: str) -> Path:
        """Where an image of a result lies."""
        return self.folder / result["folder"] / file


def read_benchmark(folder: Path, name: str) -> Benchmark:
    """Read a benchmark's folder, finished or not, or one of scores of existing images.

    Raises:
        FileNotFoundError: it is none.
    """
    folder = folder.resolve()
    results = all_results(folder)
    summary = folder / "summary.json"
    if not results or not (summary.is_file() or (folder / JOBS).is_file()):
        raise FileNotFoundError(f"{folder} holds neither a benchmark, nor a study of controls, nor a training run")
    if (folder / JOBS).is_file():
        keys: list[str] = json.loads((folder / JOBS).read_text(encoding="utf-8"))
        missing = [_told(folder, key) for key in keys if not (folder / "results" / f"{key}.json").is_file()]
    else:
        missing = json.loads(summary.read_text(encoding="utf-8"))["missing"]
    arms = sorted(results, key=lambda r: arm_order(r["arm"]))  # the anchors, then the methods by their names
    return Benchmark(name, folder, results, summarize(arms), missing, results[0]["judges"])


def _told(folder: Path, key: str) -> str:
    """A job without a result: why it failed, or that nobody came to it."""
    error = folder / "results" / f"{key}.error.txt"
    return f"{key} ({error.read_text(encoding='utf-8')})" if error.is_file() else f"{key} (not done yet)"


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their names or, where these are the same, those of their parents above."""
    parts = [folder.resolve().parts for folder in folders]
    while len({part[-1] for part in parts}) == 1 < len(set(parts)):
        parts = [part[:-1] for part in parts]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


@dataclass(frozen=True)
class Collection:
    """Benchmarks, studies of controls and training runs, each in the order of their folders."""

    benchmarks: list[Benchmark]
    studies: list[ControlSection]
    runs: list[Run]


def read_folders(folders: Sequence[Path]) -> Collection:
    """What lies in the folders.

    Raises:
        FileNotFoundError: in one of them there is none of it.
    """
    found = Collection([], [], [])
    for folder, name in zip(folders, distinct_names(folders), strict=True):
        if (folder / "provenance.json").is_file():
            found.runs.append(read_run(folder))
        elif (folder / OUTLINE).is_file():
            found.studies.append(read_section(folder, name))
        else:
            found.benchmarks.append(read_benchmark(folder, name))
    return found
