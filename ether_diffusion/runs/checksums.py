"""Checksums of a checkpoint: what was damaged since it was written is named, and not trained on."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

from ether_diffusion.files import write_text
from ether_diffusion.reading import read_json, shown

CHECKSUMS = "checksums.json"
"""In a checkpoint, written last: from each file's name to the SHA-256 of its content."""
NEEDED = ("trained.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl")
"""What every checkpoint has; those of 0.1 have no checksums."""


def write_checksums(folder: Path) -> None:
    """Write ``checksums.json`` of all files in a folder and below it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUMS]
    sums = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    write_text(folder / CHECKSUMS, json.dumps(sums, indent=1))


def damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; nothing if it is whole.

    Without checksums the files' own are looked at: those within files of ``torch.save``, and the lengths in the header
    of safetensors.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return [f"{name}: {problem}" for name in NEEDED if (problem := _unreadable(folder / name))]
    try:
        sums = read_json(path, dict[str, str])
    except (OSError, ValueError):
        return [f"{CHECKSUMS}: it cannot be read"]
    unnamed = [name for name in NEEDED if name not in sums and (folder / name).exists()]
    problems = [f"{CHECKSUMS}: it does not name {name}" for name in unnamed]
    for name, expected in sums.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{CHECKSUMS}: it names {shown(name)}, outside of the checkpoint")
        elif not (folder / name).is_file():
            problems.append(f"{name}: it is missing")
        elif sha256(folder / name) != expected:
            problems.append(f"{name}: its content has changed since it was written")
    return problems


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open  # --help needs what else is here, and not this

    if not path.is_file():
        return "it is missing"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return None
        with zipfile.ZipFile(path) as archive:
            return None if archive.testzip() is None else "it is damaged"
    except (SafetensorError, zipfile.BadZipFile, OSError):
        return "it is refused unread, for it is damaged or no file that torch.save wrote"
