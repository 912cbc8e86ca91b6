"""What a run wrote into its folder, by its own record; nothing else in the folder is ever removed or replaced."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ether_diffusion.families.parts import DENOISERS, TEXT_ENCODERS
from ether_diffusion.reading import check_regular, parse_json, read_bytes
from ether_diffusion.runs.choosing import BEST, SAMPLE_SCORES

RECORD = ".written.jsonl"
"""In a run folder: the path of each file that the run wrote or is about to write, a JSON string per line."""

RUN_FILES = (
    "config.yaml",
    "provenance.json",
    "metrics.jsonl",
    "validation.jsonl",
    SAMPLE_SCORES,
    "scores.json",
    "report.html",
    "README.md",
    "ether_weights.safetensors",
    "learned_embeds.safetensors",
    "pytorch_lora_weights.safetensors",
)
"""Files that every run may write; each run claims them when it begins."""

RUN_FOLDERS = ("samples", "checkpoints", BEST, "ether-diffusion")
"""Folders that runs write to; the last is TensorBoard's. Caches and class images stay, for they may be used again."""

MODEL_FILES = (
    "model_index.json",
    *DENOISERS,
    "controlnet",
    "vae",
    *TEXT_ENCODERS,
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "scheduler",
)
"""What runs of full and of peft's methods write too."""

NAMES = (*RUN_FILES, *RUN_FOLDERS, *MODEL_FILES)
"""All names directly in a run folder that a run may write."""

TRACKER = re.compile(r"ether-diffusion/(.*/)?(events\.out\.tfevents\.[^/]*|hparams\.yml)")
"""What TensorBoard writes: names that nobody else gives, and that are not known beforehand."""

UNRECORDED = re.compile(
    r"samples/prompts\.json|samples/step-\d+/\d+\.png|samples/conditions/\d+\.png"
    r"|checkpoints/step-\d+/(trained\.safetensors|optimizer\.bin|scaler\.pt|checksums\.json)"
    r"|checkpoints/step-\d+/(custom_checkpoint|random_states)_\d+\.pkl"
    r"|checkpoints/step-\d+/([^/]+/)?ether_weights\.safetensors"
    r"|[a-z_0-9]+/adapter_(config\.json|model\.safetensors)"
    r"|controlnet/(config\.json|diffusion_pytorch_model\.safetensors)"
)
"""What runs write in folders, for those of 0.1, which kept no record."""


def is_run(folder: Path) -> bool:
    """Whether a run of this toolkit wrote to the folder: it has a record, or, of 0.1, a provenance of ours."""
    if (folder / RECORD).is_file():
        return True
    try:
        known = parse_json(read_bytes(folder / "provenance.json"))
    except (OSError, ValueError):
        return False
    return isinstance(known, dict) and {"config_hash", "base_model", "versions"} <= known.keys()


def note_written(folder: Path, paths: Iterable[Path]) -> None:
    """Add files of the run, or all files in folders of it, to its record; call it before they get their names.

    Args:
        folder: the run folder.
        paths: absolute or relative to the same place as ``folder``, and in it.
    """
    files = [file for path in paths for file in (_files(path) if path.is_dir() else [path])]
    known = _recorded(folder)
    new = dict.fromkeys(name for file in files if (name := file.relative_to(folder).as_posix()) not in known)
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder / RECORD):
            check_plain(folder / RECORD)
        with (folder / RECORD).open("a", encoding="utf-8") as record:
            record.write("".join(json.dumps(name) + "\n" for name in new))
            record.flush()
            os.fsync(record.fileno())


def check_plain(path: Path) -> None:
    """Refuse to write into what is no file of the folder itself.

    Raises:
        OSError: it is a link, a folder, a pipe or a device; the message names it.
    """
    if path.is_symlink():
        raise OSError(f"{path} is a link, and the run would write to where it leads: remove it")
    check_regular(path)


def written(folder: Path) -> list[Path]:
    """The files in the folder that its run wrote: none if it never was a run."""
    if not is_run(folder):
        return []
    recorded = _recorded(folder)
    pipeline = (folder / "model_index.json").is_file()
    found = []
    for file in _files_under(folder, NAMES):
        name = file.relative_to(folder).as_posix()
        own = _is_own(name, recorded)
        if not recorded:
            own = own or name in RUN_FILES or (pipeline and name.partition("/")[0] in MODEL_FILES)
        if own or TRACKER.fullmatch(name):
            found.append(file)
    return found


def begin_record(folder: Path) -> None:
    """Claim the names that every run writes; a run of 0.1 that goes on gets its record of what it wrote before."""
    note_written(folder, [*written(folder), *(folder / name for name in RUN_FILES)])


def foreign(folder: Path, models: bool) -> list[Path]:
    """Files that no run wrote and that a new run would replace; others may stay where they are.

    Args:
        folder: the run folder.
        models: whether the new run writes whole models or folders of peft.
    """
    own = set(written(folder))
    others = [file for file in _files_under(folder, NAMES if models else (*RUN_FILES, *RUN_FOLDERS)) if file not in own]
    if not is_run(folder):
        return others
    named = {*RUN_FILES, "samples/prompts.json"}
    whole = re.compile(rf"(samples|checkpoints)/step-\d+/.*|{BEST}/.*|({'|'.join(map(re.escape, MODEL_FILES))})(/.*)?")
    names = {file: file.relative_to(folder).as_posix() for file in others}
    return [file for file, name in names.items() if name in named or whole.fullmatch(name)]


def remove_written(folder: Path) -> None:
    """Remove what the run in the folder wrote, the record last, and the folders that are empty then."""
    for file in written(folder):
        file.unlink(missing_ok=True)
    for name in NAMES:
        top = folder / name
        if top.is_dir() and not top.is_symlink():
            for path, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):  # something else is in it
                    os.rmdir(path)
    (folder / RECORD).unlink(missing_ok=True)


def remove_own(run: Path, folder: Path, place: str) -> bool:
    """Remove what the run wrote in one of its folders, and the folders that are empty then; links are not followed.

    Args:
        run: the run folder.
        folder: in it.
        place: the folder's name in the record, such as ``checkpoints/step-000200``; it may have another one by now.

    Returns:
        Whether something of others is left.
    """
    recorded = _recorded(run)
    for file in _files(folder):
        if _is_own(f"{place}/{file.relative_to(folder).as_posix()}", recorded):
            file.unlink(missing_ok=True)
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # something else is in it
            os.rmdir(path)
    return folder.exists()


def is_left(run: Path, folder: Path) -> bool:
    """Whether a folder of the run has nothing of it any more, but files of others."""
    files, recorded = _files(folder), _recorded(run)
    return bool(files) and not any(_is_own(file.relative_to(run).as_posix(), recorded) for file in files)


def _is_own(name: str, recorded: set[str]) -> bool:
    """Whether the run wrote the file; a run of 0.1 has no record, and its files are known by their names."""
    return name in recorded if recorded else bool(UNRECORDED.fullmatch(name))


def check_inputs(folder: Path, inputs: Mapping[str, Path], names: Sequence[str] = NAMES) -> None:
    """Refuse to write where inputs are.

    Args:
        folder: that is written to.
        inputs: from the setting to the file or folder that it names; those that do not exist are passed over.
        names: directly in the folder, that are written.

    Raises:
        ValueError: an input is the folder itself, or is in what is written there.
    """
    root = folder.resolve()
    for setting, path in inputs.items():
        place = path.resolve()
        if place == root:
            raise ValueError(f"{setting} and output_dir are the same folder, {folder}: choose another --output_dir")
        if place.exists() and place.is_relative_to(root) and place.relative_to(root).parts[0] in names:
            raise ValueError(
                f"{setting} {path} is in {folder / place.relative_to(root).parts[0]}, which the run itself writes: "
                "move it, or choose another --output_dir"
            )


def _recorded(folder: Path) -> set[str]:
    """The names in the record. A torn last line is passed over, and so is a name that leads out of the folder."""
    path = folder / RECORD
    names = set()
    for line in read_bytes(path).decode("utf-8", "replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            name = parse_json(line)
            if isinstance(name, str) and ".." not in PurePosixPath(name).parts:
                names.add(name)
    return names


def _files_under(folder: Path, names: Iterable[str]) -> list[Path]:
    """Files and links of those names, and in folders of those names; links are not followed."""
    found = []
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            found += _files(path)
        elif path.exists() or path.is_symlink():
            found.append(path)
    return found


def _files(folder: Path) -> list[Path]:
    return [Path(path) / name for path, folders, files in os.walk(folder) for name in (*files, *_links(path, folders))]


def _links(path: str, folders: list[str]) -> list[str]:
    return [name for name in folders if os.path.islink(os.path.join(path, name))]
