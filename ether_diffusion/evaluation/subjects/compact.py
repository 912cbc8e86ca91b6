"""One small file of a benchmark: the scores of every picture, the settings behind them, and what makes jobs the same.

Every benchmark writes it as ``results.json``. ``docs/results`` has such files, of which ``docs/tables.py`` makes the
tables; :mod:`ether_diffusion.evaluation.subjects.against` holds other runs against one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ether_diffusion.evaluation.runner import Job
from ether_diffusion.evaluation.subjects.arms import DRAWING
from ether_diffusion.evaluation.subjects.protocols import fingerprint
from ether_diffusion.evaluation.subjects.settings import ANCHORS, BASE
from ether_diffusion.evaluation.subjects.summary import METRICS, SCALED, Result
from ether_diffusion.files import write_text
from ether_diffusion.reading import DamagedFileError, matches, read_json, read_yaml, shown
from ether_diffusion.runs.base import SETTINGS as BASE_SETTINGS
from ether_diffusion.runs.folder import public_settings
from ether_diffusion.runs.scores import without_folder

CONFIG = "config.yaml"
"""In a benchmark's folder: its settings."""
JOBS = "jobs.json"
"""Beside it: the keys of all jobs, so that a reader sees what is missing."""
DIGITS = 5
"""Of a score in the file."""
WAY = "way"
"""In the result of an arm that draws another arm's training in a further way: which."""
FACTS = (
    *("arm", "learning_rate", "subject", "seed", "settings_hash", "base_hash", "trained_parameters", "bytes"),
    *("diverged", "real", "distances", WAY, "chosen_step", "chosen_by"),
)
"""What the file keeps of a job beside its scores."""
KINDS = tuple(dict.fromkeys(metric.rows for metric in METRICS))
"""Of the rows of a result."""
PICTURES = tuple(kind for kind in KINDS if kind != "prompts")
"""Those with a row for each picture."""
ASKED = (*DRAWING, "instance_prompt", "class_prompt", "drift")
"""Settings of a benchmark that all of its pictures depend on."""
BUDGET = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps")
"""Settings of a training that say how long it may learn."""


class SubjectFacts(TypedDict):
    """What is asked of a subject: prompts by kind of picture; hashes of its references and true pictures, if known."""

    prompts: dict[str, list[str]]
    references: str | None
    truths: str | None


class Protocol(TypedDict):
    """What the jobs of a benchmark share. Rows of another protocol are not compared with them.

    ``asked``: the settings of :data:`ASKED`; ``training``: those of the training that all arms share; ``base``: names
    the base, ``base_hashes`` the weights of its components, the denoiser's under that
    name, too; ``judged_by``: weights and preprocessing of every judge, and the
    version of the scores.
    """

    name: str
    asked: dict[str, object]
    training: dict[str, object]
    base: dict[str, object]
    base_hashes: dict[str, str | None]
    judged_by: dict[str, object]
    subjects: dict[str, SubjectFacts]


class _Shared(TypedDict):
    judges: dict[str, dict[str, str]]
    protocol: NotRequired[Protocol | None]
    git_revision: NotRequired[str | None]


class _File(TypedDict):
    shared: _Shared
    arms: NotRequired[dict[str, dict[str, object]]]
    jobs: list[dict[str, object]]


@dataclass(frozen=True)
class Compact:
    """What such a file holds.

    Attributes:
        name: of the file, without its ending.
        results: as those of the benchmark, with the scores of every picture; of a file of version 0.1, or of an
            earlier 0.2, one row per job with their means.
        protocol: what the jobs share; None where the file does not say it.
        judges: who scored, with the versions of the libraries.
    """

    name: str
    results: list[Result]
    protocol: Protocol | None
    judges: dict[str, dict[str, str]]


def protocol_of(results: Sequence[Result], settings: Mapping[str, Any]) -> Protocol | None:
    """What the jobs share, from the results of the base and the benchmark's settings; None where either is missing."""
    of_base = {result["subject"]: result for result in results if result["arm"] == BASE}
    if not of_base or "training" not in settings:
        return None
    first = next(iter(of_base.values()))
    training = {key: value for key, value in settings["training"].items() if key not in BASE_SETTINGS}
    judged_by = {key: value for key, value in first.get("judged_by", {}).items() if key != "truths"}
    return {
        "name": Path(str(settings["protocol"])).stem,
        "asked": {key: settings.get(key) for key in ASKED},
        "training": public_settings(training),
        "base": public_settings({key: settings["training"].get(key) for key in BASE_SETTINGS}),
        "base_hashes": {**first.get("base_hashes", {}), "denoiser": first.get("base_hash")},
        "judged_by": judged_by,
        "subjects": {name: _subject_facts(result) for name, result in of_base.items()},
    }


def _subject_facts(result: Result) -> SubjectFacts:
    references = [Path(path) for path in result.get("references", ())]
    return {
        "prompts": {kind: [row["prompt"] for row in result[kind]] for kind in PICTURES if result.get(kind)},
        "references": fingerprint(references) if references and all(path.is_file() for path in references) else None,
        "truths": result.get("judged_by", {}).get("truths"),
    }


def write_compact(path: Path, results: Sequence[Result], settings: Mapping[str, Any]) -> None:
    """Write the results with what all share; a line for each job.

    Args:
        path: the file; it is written atomically.
        results: of all jobs.
        settings: of the benchmark, as its ``config.yaml`` has them; empty for pictures that existed.
    """
    judges = {name: without_folder(facts) for name, facts in results[0]["judges"].items()} if results else {}
    shared = {
        "protocol": protocol_of(results, settings),
        "judges": judges,
        "git_revision": results[0].get("git_revision") if results else None,
    }
    arms = {arm_key(r): _public(r["settings"]) for r in results if r["arm"] not in ANCHORS and "settings" in r}
    lines = ",\n".join(json.dumps(_job(result), sort_keys=True) for result in results)
    write_text(
        path, f'{{"shared": {json.dumps(shared)},\n"arms": {json.dumps(arms, indent=0)},\n"jobs": [\n{lines}\n]}}\n'
    )


def arm_key(result: Result) -> str:
    """What names an arm at its learning rate, as in the folders of a benchmark."""
    return Job(result["arm"], {}, None, 0, result["learning_rate"]).key.partition("/")[0]


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    return public_settings({key: value for key, value in settings.items() if key not in BASE_SETTINGS})


def _job(result: Result) -> dict[str, Any]:
    job = {name: result[name] for name in FACTS if result.get(name) is not None}
    job["pictures"] = len(result["images"])
    job["scores"] = {key: values for kind in KINDS for key, values in _columns(result.get(kind, []), kind).items()}
    if result.get("at"):
        job["at"] = {strength: _columns(rows, "images") for strength, rows in result["at"].items()}
    return job


def _columns(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[float | None]]:
    """The scores of rows of one kind by metric; scaled ones follow from the others."""
    keys = [metric.key for metric in METRICS if metric.rows == kind and not metric.key.endswith(SCALED)]
    return {key: [_rounded(row.get(key)) for row in rows] for key in keys if any(key in row for row in rows)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def read_compact(path: Path) -> Compact:
    """Read such a file back.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is none; the message names it.
    """
    found: _File = read_json(path, _File)
    protocol = found["shared"].get("protocol")
    settings = found.get("arms", {})
    results = [_result(job, path, protocol) for job in found["jobs"]]
    for result in results:
        result["judges"] = found["shared"]["judges"]
        if (own := settings.get(arm_key(result))) is not None:
            result["settings"] = own
    return Compact(path.stem, results, protocol, found["shared"]["judges"])


def _result(job: Mapping[str, Any], path: Path, protocol: Protocol | None) -> Result:
    result: Result = {"learning_rate": None, **job}
    scores, subject = result.pop("scores", None), result.get("subject")
    if not matches(scores, dict[str, float | list[float | None]]):
        raise DamagedFileError(f"{path} is damaged: the scores of a job are {shown(scores)}")
    prompts = protocol["subjects"][str(subject)]["prompts"] if protocol and subject in protocol["subjects"] else {}
    for kind in KINDS:
        keys = [metric.key for metric in METRICS if metric.rows == kind and metric.key in scores]
        result[kind] = _rows({key: scores[key] for key in keys}, prompts.get(kind, []))
    if "at" in result:
        at = {strength: _rows(columns, prompts.get("images", [])) for strength, columns in result["at"].items()}
        result["at"] = at
    return result


def _rows(columns: Mapping[str, float | list[float | None]], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """One row per picture from the scores by metric; means, as older files have them, make one row."""
    lists = {key: values if isinstance(values, list) else [values] for key, values in columns.items()}
    count = max(map(len, lists.values()), default=0)
    rows: list[dict[str, Any]] = [{"prompt": prompts[n]} if len(prompts) == count else {} for n in range(count)]
    for key, values in lists.items():
        for row, value in zip(rows, values, strict=True):
            if value is not None:
                row[key] = value
    return rows


def in_order(results: list[Result], folder: Path) -> list[Result]:
    """The results in the order of the benchmark's jobs, as far as its folder says it."""
    jobs: list[str] = read_json(folder / JOBS, list[str]) if (folder / JOBS).is_file() else []
    place = {key: number for number, key in enumerate(jobs)}

    def place_of(result: Result) -> int:
        arms = (arm_key(result), result["arm"])  # a rate that all arms share is in no folder's name
        keys = (f"{arm}/{result['subject']}/seed-{result['seed']}" for arm in arms)
        return next((place[key] for key in keys if key in place), len(place))

    return sorted(results, key=place_of)


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings of a benchmark's folder; none of pictures that existed before they were scored.

    Raises:
        DamagedFileError: ``config.yaml`` holds something else.
    """
    path = folder / CONFIG
    found = read_yaml(path) if path.is_file() else {}
    if not matches(found, dict[str, object]):
        raise DamagedFileError(f"{path} is damaged: it holds {shown(found)}, settings are expected")
    settings: dict[str, Any] = found
    return settings
