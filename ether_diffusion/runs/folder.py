"""The run folder: who may write to it, what the run was, and its measurements."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml

from ether_diffusion.files import write_text
from ether_diffusion.reading import DamagedFileError, matches, parse_json, read_bytes, read_json, read_yaml, shown
from ether_diffusion.registry import METHODS
from ether_diffusion.runs.checksums import damage
from ether_diffusion.runs.written import check_inputs, foreign, is_left, is_run, remove_own, remove_written

logger = logging.getLogger(__name__)

PACKAGES = ("ether-diffusion", "diffusers", "transformers", "accelerate", "safetensors", "pillow", "peft")

INPUTS = frozenset(
    {
        "pretrained_model_name_or_path",
        "base_config",
        "controlnet_model_name_or_path",
        "segmenter",
        "cache_dir",
        "training_adapter",
        "instance_data_dir",
        "subjects_dir",
        "class_data_dir",
        "validation_data_dir",
        "train_data_dir",
        "dino",
        "clip",
    }
)
"""Settings of the programs that name what a run reads, and must not be where it writes."""
PATHS = INPUTS | {"output_dir", "resume"}
"""Settings that may name a place on this machine, of which others see the last part only."""
OF_THE_COMMAND = frozenset({"overwrite", "resume", "quiet", "log_level"})
"""Settings of one call of a program, which are not kept with the run."""


@dataclass(frozen=True)
class RunSection:
    """What a run folder needs of a training's settings.

    Attributes:
        output_dir: the run folder.
        overwrite: whether a run that is there already may be replaced.
        resume: the checkpoint to continue from: "latest", or its name; None for a new run.
        base_model: name of the base.
        settings: all settings as plain YAML values, which ``config.yaml`` holds.
        config_hash: of those that the result depends on.
        inputs: from a setting to the folder or file that the run reads under it.
    """

    output_dir: Path
    overwrite: bool
    resume: str | None
    base_model: str
    settings: Mapping[str, Any]
    config_hash: str
    inputs: Mapping[str, Path] = field(default_factory=dict)


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for others: of a path on this machine the last part."""
    from ether_diffusion.metrics.backbones import ANYTORCH  # they import torch, and settings are read before that
    from ether_diffusion.pipelines.file import public_name

    def public(value: str) -> str:
        prefix = ANYTORCH if value.startswith(ANYTORCH) else ""
        return prefix + public_name(value.removeprefix(prefix))

    return {key: public(str(value)) if key in PATHS and value else value for key, value in settings.items()}


def open_run_folder(run: RunSection) -> Path | None:
    """Make sure that the run can be written, and return the checkpoint to continue from, if one is asked for.

    Raises:
        FileNotFoundError: there is nothing to resume.
        FileExistsError: the folder holds a run, and neither resume nor overwrite was asked for; or files that no run
            wrote and this one would replace.
        OSError: the folder cannot be written.
        ValueError: an input of the run is where the run writes, or the checkpoint is damaged.
    """
    folder = run.output_dir
    check_inputs(folder, run.inputs)
    if run.resume is not None:
        return good_checkpoint(folder, run.resume)
    if is_run(folder) and not run.overwrite:
        state = read_provenance(folder).get("status", "unfinished")
        resumable = ", --resume latest to continue it" if list_checkpoints(folder / "checkpoints") else ""
        raise FileExistsError(
            f"{folder} already holds a run ({state}): choose another --output_dir{resumable}, "
            "or --overwrite to replace it"
        )
    own = METHODS[str(run.settings["method"])].is_own and run.settings.get("control") != "controlnet"
    if others := foreign(folder, models=not own):
        names = ", ".join(str(path.relative_to(folder)) for path in others[:5]) + (", …" if len(others) > 5 else "")
        raise FileExistsError(
            f"{folder} holds {names}, which no run of this toolkit wrote and this one would replace: "
            "choose another --output_dir, or move them away"
        )
    nearest = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    try:  # without making the folder: a run that cannot start leaves none
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OSError(f"cannot write to --output_dir {folder}: {error.strerror or error}") from error
    return None


def clear_run_folder(folder: Path) -> None:
    """Remove the run that ``--overwrite`` replaces: when all that the new one needs is known to be there.

    Only files that the run wrote, by its own record, are removed.
    """
    remove_written(folder)


def write_config(run: RunSection) -> None:
    """Write the resolved settings as ``config.yaml``, which ``--config`` reads back, to start another such run."""
    settings = {key: value for key, value in run.settings.items() if key not in OF_THE_COMMAND}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_text(run.output_dir / "config.yaml", text)


def changed_settings(run: RunSection, base_hash: Mapping[str, str | None]) -> list[str]:
    """What differs from how the run in the folder was started, the base's weights included, as "name: old → new"."""
    path = run.output_dir / "config.yaml"
    old = (read_yaml(path) if path.is_file() else None) or {}
    if not isinstance(old, dict):
        raise DamagedFileError(f"{path} is damaged: it holds {shown(old)}, settings are expected")
    old["base_hash"] = read_provenance(run.output_dir).get("base_hash", base_hash)
    ignored = OF_THE_COMMAND | {"output_dir", "prompt_chunks"}  # of the last the facts say the number
    new = {key: value for key, value in run.settings.items() if key not in ignored} | {"base_hash": base_hash}
    return [f"{key}: {old[key]} → {new[key]}" for key in new if key in old and old[key] != new[key]]


def changed_facts(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a result depends on beside the settings and differs from the record: processes, a file, pictures; named."""
    changes = []
    old, new = before.get("num_processes"), now.get("num_processes")
    if old is not None and old != new:
        changes.append(f"number of processes, {old} → {new}")
    old, new = before.get("training_adapter"), now.get("training_adapter")
    if old != new:
        changes.append("training_adapter: the file is not what it was")
    old, new = (facts.get("prompt_chunks", 1) for facts in (before, now))
    if old != new:
        changes.append(f"number of chunks of a prompt (prompt_chunks), {old} → {new}")
    old, new = before.get("base_file"), now.get("base_file")
    if old != new:
        changes.append("base: the file is not what it was")
    old, new = (_judging(facts.get("sample_judges")) for facts in (before, now))
    if old and new and old != new:
        changes.append("set of judges of the samples")
    old, new = before.get("pictures"), now.get("pictures")
    if isinstance(old, dict) and isinstance(new, dict) and old != new:
        kinds = {
            "gone": [name for name in old if name not in new],
            "new": [name for name in new if name not in old],
            "changed": [name for name in new if name in old and old[name] != new[name]],
        }
        parts = [f"{kind}: {', '.join(names[:5])}{', …' * (len(names) > 5)}" for kind, names in kinds.items() if names]
        changes.append(f"set of pictures, {len(old)} → {len(new)} ({'; '.join(parts)})")
    return changes


def _judging(judges: Any) -> dict[str, Any]:
    """What the scores of judges depend on, without the libraries' versions."""
    known = judges if isinstance(judges, dict) else {}
    return {name: each for name, each in known.items() if name != "libraries"}


def read_provenance(folder: Path) -> dict[str, Any]:
    """The run's ``provenance.json``, or nothing where there is none.

    Raises:
        DamagedFileError: it is damaged; without it the run can go on, but what it said is lost.
    """
    path = folder / "provenance.json"
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = read_json(path, _Recorded)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; remove it, and the run can be resumed without what it said") from error
    return content


class _Recorded(TypedDict):
    """What is read of ``provenance.json``."""

    config_hash: NotRequired[str]
    status: NotRequired[str]
    step: NotRequired[int]
    started: NotRequired[str]
    seconds: NotRequired[float]
    num_processes: NotRequired[int]
    base_hash: NotRequired[dict[str, str | None]]
    pictures: NotRequired[dict[str, str]]
    trained_parameters: NotRequired[dict[str, int]]
    sample_judges: NotRequired[dict[str, dict[str, str]]]


class Provenance:
    """What stands beside every result: settings' hash, versions, git revision, hash of the base, status.

    Args:
        run: whose.
        facts: what the program adds.
        resumed: whether the run goes on with its start and time; one that replaces another has its own.
    """

    def __init__(self, run: RunSection, facts: Mapping[str, Any], resumed: bool = True) -> None:
        self.folder = run.output_dir
        before = read_provenance(self.folder) if resumed else {}
        self.content: dict[str, Any] = {
            "config_hash": run.config_hash,
            "base_model": run.base_model,
            "git_revision": git_revision(),
            "versions": versions(),
            "started": before.get("started", now()),
            "seconds": before.get("seconds", 0.0),
            **facts,
        }

    def update(self, **facts: Any) -> None:
        """Change facts and write ``provenance.json``."""
        self.content.update(facts)
        write_text(self.folder / "provenance.json", json.dumps(self.content, indent=1, ensure_ascii=False))


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first.

    Half-written ones have other names; of a removed one the files of others may be left, which is none.
    """
    found = [path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if not is_left(folder.parent, path)), key=step_of)


def remove_checkpoints(paths: Sequence[Path]) -> None:
    """Delete checkpoints of a run, of each what the run wrote; killed meanwhile, it leaves none that looks whole."""
    for path in paths:
        if path.is_symlink():
            path.unlink()
            continue
        doomed = path.with_name(f".{path.name}.old")
        os.replace(path, doomed)
        remove_doomed(doomed)


def remove_doomed(doomed: Path) -> None:
    """Delete what the run wrote in a checkpoint that :func:`remove_checkpoints` has renamed; the rest gets its name."""
    path = doomed.with_name(doomed.name.removeprefix(".").removesuffix(".old"))
    if remove_own(path.parent.parent, doomed, f"checkpoints/{path.name}"):
        logger.warning("%s holds files that the run did not write: they stay", path)
        if not path.exists():
            os.replace(doomed, path)


def good_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint that ``--resume`` names, whole; "latest-good" is the newest that is.

    Raises:
        FileNotFoundError: the run has no such checkpoint.
        ValueError: it is damaged; the message names the newest that is whole.
    """
    newest = wanted == "latest-good"
    path = find_checkpoint(output_dir, "latest" if newest else wanted)
    if not (problems := damage(path)):
        return path
    told = f"the checkpoint {path} is damaged ({'; '.join(problems)})"
    others = [other for other in reversed(list_checkpoints(output_dir / "checkpoints")) if other != path]
    good = next((other for other in others if not damage(other)), None)
    if good is None:
        raise ValueError(f"{told}, and no other checkpoint is whole: start anew with --overwrite")
    if newest:
        logger.warning("%s; going on from %s", told, good.name)
        return good
    raise ValueError(f"{told}; the newest good one is {good.name}: pass --resume {good.name}, or --resume latest-good")


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint that ``--resume`` names: "latest", or the name of one.

    Raises:
        FileNotFoundError: the run has no such checkpoint; the message lists those it has.
    """
    found = list_checkpoints(output_dir / "checkpoints")
    if not found:
        raise FileNotFoundError(
            f"nothing to resume: {output_dir} holds no checkpoints; start the run without --resume "
            "(with --overwrite, if the folder holds one without checkpoints)"
        )
    if wanted == "latest":
        return found[-1]
    for path in found:
        if wanted in (path.name, str(path)) or wanted == str(step_of(path)):
            return path
    names = ", ".join(path.name for path in found)
    raise FileNotFoundError(f"{output_dir} holds no checkpoint {wanted!r}; it has: {names}; or pass --resume latest")


def step_of(path: Path) -> int:
    """The number of optimisation steps behind the checkpoint at ``path``."""
    return int(path.name.removeprefix("step-"))


def forget_after(folder: Path, step: int) -> None:
    """Remove samples and checkpoints of later steps, which a run resumed from an earlier checkpoint makes anew.

    What the run did not write, by its own record, stays.
    """
    later = [path for path in list_checkpoints(folder / "checkpoints") if step_of(path) > step]
    if later:
        logger.warning("going on from step %d: %s are removed", step, ", ".join(path.name for path in later))
    remove_checkpoints(later)
    for path in (folder / "samples").glob("step-*"):
        later_grid = re.fullmatch(r"step-\d+", path.name) and step_of(path) > step
        if later_grid and (path.is_symlink() or remove_own(folder, path, f"samples/{path.name}")):
            logger.warning("%s holds files that the run did not write: they stay", path)


class MetricsFile:
    """Rows of steps, one JSON object a line; a resumed run drops the rows after its checkpoint.

    ``metrics.jsonl`` has one row per optimisation step, ``validation.jsonl`` one whenever samples are due.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        kept = [row for row in read_rows(self.path) if row["step"] <= start_step]
        self.last_step: int | None = kept[-1]["step"] if kept else None
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; what is not finite is left out, since JSON has no word for it."""
        self.last_step = row["step"]
        finite = {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file, none where there is none; lines that cannot be read are left out, and counted.

    A killed run may leave a torn last line, about which nothing is said.
    """
    rows, damaged = [], 0
    *lines, _ = read_bytes(path).decode("utf-8", "replace").split("\n") if path.is_file() else [""]
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if matches(row, dict[str, object]) and matches(row.get("step"), int):
            rows.append(row)
        else:
            damaged += 1
    if damaged:
        logger.warning("%s: %d lines are damaged and left out", path, damaged)
    return rows


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on; torch's with its build, which package metadata may lack."""
    import torch  # takes seconds, and the settings need what else is here

    found = {"torch": str(torch.__version__)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the checkout that this library runs from, with "+changes" if it was edited; None outside of one."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # installed inside somebody else's checkout
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
