"""What lies in a benchmark's folder, finished or not, for pages and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.evaluation.runner import why_missing
from ether_diffusion.evaluation.subjects.compact import JOBS, settings_in
from ether_diffusion.evaluation.subjects.summary import (
    Metric,
    Result,
    all_results,
    arm_order,
    best_rates,
    primary,
    summarize,
)
from ether_diffusion.reading import read_json


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
        settings: of ``config.yaml``; empty for images that existed.
    """

    name: str
    folder: Path
    results: list[Result]
    rows: list[dict[str, Any]]
    missing: list[str]
    judges: dict[str, dict[str, str]]
    settings: dict[str, object]

    @property
    def shown_arms(self) -> list[dict[str, Any]]:
        """Of every arm the row of :func:`best_rates`: what pictures and tables by subject are of."""
        return [row for row in best_rates([row for row in self.rows if row["images"]]) if row["scores"]]

    @property
    def base(self) -> str:
        """The name of the base model; empty for images that existed."""
        training: Any = self.settings.get("training", {})
        return str(training.get("pretrained_model_name_or_path", ""))

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
        keys: list[str] = read_json(folder / JOBS, list[str])
        missing = [why_missing(folder, key) for key in keys if not (folder / "results" / f"{key}.json").is_file()]
    else:
        missing = read_json(summary, dict).get("missing", [])
    arms = sorted(results, key=lambda r: arm_order(r["arm"]))  # the anchors, then the methods by their names
    return Benchmark(name, folder, results, summarize(arms), missing, results[0]["judges"], settings_in(folder))
