"""What the page of many runs shows: benchmark folders arm by arm, and runs of training side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.evaluation.summary import Result, best_rates, summarize
from ether_diffusion.training.run_record import Run, read_run


@dataclass(frozen=True)
class Benchmark:
    """A folder that ``eval/dreambench.py`` or ``eval.subject_fidelity`` wrote.

    Attributes:
        folder: absolute.
        results: one per job; of scored folders without jobs, none.
        rows: of the summary: arms at their learning rates.
        missing: what is not in it, in words.
        judges: who scored.
    """

    folder: Path
    results: list[Result]
    rows: list[dict[str, Any]]
    missing: list[str]
    judges: dict[str, dict[str, str]]

    @property
    def shown_arms(self) -> list[dict[str, Any]]:
        """Of every arm the row with the best DINO: what pictures and tables by subject are of."""
        return [row for row in best_rates([row for row in self.rows if row["images"]]) if row["scores"]]

    @property
    def subjects(self) -> list[str]:
        """Of all results, in their order."""
        return list(dict.fromkeys(result["subject"] for result in self.results))

    def results_of(self, row: dict[str, Any], subject: str) -> list[Result]:
        """The results of an arm's row for one subject, a result per seed."""
        key = (row["arm"], row["learning_rate"], subject)
        return [r for r in self.results if (r["arm"], r["learning_rate"], r["subject"]) == key]

    def picture(self, result: Result, file: str) -> Path:
        """Where an image of a job lies."""
        rate = result["learning_rate"]
        arm = result["arm"] if rate is None else f"{result['arm']}@{rate:g}"
        return self.folder / "images" / arm / result["subject"] / f"seed-{result['seed']}" / "images" / file


def read_benchmark(folder: Path) -> Benchmark:
    """Read a benchmark's folder, finished or not.

    Raises:
        FileNotFoundError: it is none.
    """
    folder = folder.resolve()
    paths = sorted((folder / "results").rglob("*.json"))
    results: list[Result] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    results.sort(key=lambda r: (r["subject"], r["arm"] != "base", r["arm"], r["learning_rate"] or 0.0, r["seed"]))
    failed = [str(path.relative_to(folder / "results")) for path in sorted((folder / "results").rglob("*.error.txt"))]
    if results:
        arms = sorted(results, key=lambda r: r["arm"] != "base")  # the base first, then in the order of their names
        return Benchmark(folder, results, summarize(arms), failed, results[0]["judges"])
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(f"{folder} holds neither results of a benchmark nor a training run")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return Benchmark(folder, [], summary["rows"], summary["missing"], summary["judges"])


def read_folders(folders: list[Path]) -> tuple[list[Benchmark], list[Run]]:
    """The benchmarks and the training runs among the folders, in their order.

    Raises:
        FileNotFoundError: a folder is neither.
    """
    benchmarks, runs = [], []
    for folder in folders:
        if (folder / "provenance.json").is_file():
            runs.append(read_run(folder))
        else:
            benchmarks.append(read_benchmark(folder))
    return benchmarks, runs
