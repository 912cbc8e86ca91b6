"""A benchmark's results in one small file: of every job the means of its scores. It can be committed and read again.

The tables of README and docs are made from such files (``docs/tables.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ether_diffusion.evaluation.subjects.summary import METRICS, SCALED, Result
from ether_diffusion.files import write_text

FACTS = ("arm", "learning_rate", "subject", "seed", "settings_hash", "base_hash", "trained_parameters", "diverged")
DIGITS = 5


def compact(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One entry per job: its facts, the mean of every score, how many pictures it is of, and its distances."""
    jobs = []
    for result in results:
        job = {name: result[name] for name in FACTS if result.get(name) is not None}
        job["pictures"] = len(result["images"])
        job["scores"] = {
            metric.key: round(fmean(values), DIGITS)
            for metric in METRICS
            if not metric.key.endswith(SCALED)  # they follow from the others
            and (values := [row[metric.key] for row in result.get(metric.rows, []) if metric.key in row])
        }
        if result.get("real"):
            job["real"] = {key: round(value, DIGITS) for key, value in result["real"].items()}
        if result.get("distances"):
            job["distances"] = result["distances"]
        jobs.append(job)
    return jobs


def write_compact(path: Path, results: Sequence[Result]) -> None:
    """Write the jobs with what all share: the judges and the revision of the code; a line for each job."""
    shared = {
        "judges": results[0]["judges"] if results else {},
        "git_revision": results[0].get("git_revision") if results else None,
    }
    lines = ",\n".join(json.dumps(job, sort_keys=True) for job in compact(results))
    write_text(path, f'{{"shared": {json.dumps(shared)},\n"jobs": [\n{lines}\n]}}\n')


def read_compact(path: Path) -> list[Result]:
    """The jobs of such a file as results, each with one row that holds the means of its scores.

    Raises:
        FileNotFoundError: there is no such file.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    results = []
    for job in found["jobs"]:
        result = {"learning_rate": None, **job, "judges": found["shared"]["judges"]}
        scores = result.pop("scores")
        for kind in dict.fromkeys(metric.rows for metric in METRICS):
            row = {m.key: scores[m.key] for m in METRICS if m.rows == kind and m.key in scores}
            result[kind] = [row] if row else []
        results.append(result)
    return results
