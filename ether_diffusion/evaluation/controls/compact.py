"""One small file of a study of controls: what every training scored at its steps, and what the scores depend on.

``ether study table FOLDER FILE`` writes it; ``docs/results`` has such files, of which ``docs/tables.py`` makes tables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ether_diffusion.evaluation.controls.findings import ControlResult, Findings
from ether_diffusion.files import write_text
from ether_diffusion.reading import read_json
from ether_diffusion.runs.folder import public_settings
from ether_diffusion.runs.scores import without_folder

SHARED = ("choices", "warnings", "pairs", "samples_per_pair", "originals")
"""What the file keeps of one result of the last step: all trainings share it."""
OF_JOB = ("arm", "rate", "seed", "base_hash", "git_revision", "trained_parameters")
"""What it keeps of each training."""


class _Step(TypedDict):
    """What a training scored at a step, or that and why it ended there."""

    steps: int
    scores: NotRequired[dict[str, dict[str, float | None]]]
    diverged: NotRequired[str]


class _Job(TypedDict):
    """A training; without ``results`` only its key is known."""

    arm: NotRequired[str]
    rate: NotRequired[float | None]
    seed: NotRequired[int]
    settings: NotRequired[dict[str, object]]
    trained_parameters: NotRequired[dict[str, int]]
    results: list[_Step]


class _Shared(TypedDict):
    """What all trainings share; ``steps`` is their length."""

    steps: int


class _File(TypedDict):
    shared: _Shared
    jobs: dict[str, _Job]


def write_rows(path: Path, findings: Findings) -> int:
    """Write what a study's trainings scored; a line for each.

    Args:
        path: the file; it is written atomically.
        findings: of a study of which a training is finished, at least.

    Returns:
        How many trainings the file has.
    """
    first = findings.finished[0].last[0]
    shared = {"steps": findings.last_step} | {key: first[key] for key in SHARED if key in first}
    shared["judges"] = {name: without_folder(facts) for name, facts in first["judges"].items()}
    jobs = {key: _job(rows) for key, rows in findings.results.items()}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(job)}" for key, job in jobs.items())
    write_text(path, f'{{"shared": {json.dumps(shared)},\n"jobs": {{\n{lines}\n}}}}\n')
    return len(jobs)


def _job(rows: Sequence[ControlResult]) -> dict[str, Any]:
    first = rows[0] if rows else {}
    job: dict[str, Any] = {key: first[key] for key in OF_JOB if key in first}
    if "settings" in first:
        job["settings"] = public_settings(first["settings"])
    return job | {"results": [_step(row) for row in rows]}


def _step(row: ControlResult) -> dict[str, Any]:
    if "diverged" in row:
        return {"steps": row["steps"], "diverged": row["diverged"]}
    scores = {key: {part: score[part] for part in ("mean", "spread")} for key, score in row["scores"].items()}
    return {"steps": row["steps"], "scores": scores}


def read_rows(path: Path) -> Findings:
    """The findings of such a file. They have no pictures and no classes.

    Raises:
        DamagedFileError, OSError: it is no such file.
    """
    content: _File = read_json(path, _File)
    results: dict[str, list[ControlResult]] = {}
    for key, job in content["jobs"].items():
        facts = {**content["shared"], **{name: value for name, value in job.items() if name != "results"}}
        results[key] = [{**facts, **step} for step in job["results"]]
    return Findings(path.parent, path.parent, content["shared"]["steps"], results)
