"""One run holds a folder at a time."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ether_diffusion.files import write_text
from ether_diffusion.reading import parse_json, read_bytes
from ether_diffusion.runs.written import check_plain

LOCK = ".lock"
"""In a run folder while a run holds it. The system frees it when the process dies, however it dies."""
HOLDER = ".running.json"
"""Beside it: the process that holds the folder. A process that was killed leaves it behind."""


class FolderInUseError(OSError):
    """Another run holds the folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder; the folder is made, and removed again if nothing was written to it.

    What a dead process of this machine left is taken over. Of another machine nobody here can say whether its process
    lives: its lock is refused until somebody removes it.

    Raises:
        FolderInUseError: another run holds the folder; the message names its process and machine.
        OSError: the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder / LOCK):
            check_plain(folder / LOCK)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise FolderInUseError(f"{folder} is held by {_holder(folder)}: choose another --output_dir") from None
    except OSError as error:
        if isinstance(error, FolderInUseError) or error.errno is None:
            raise
        raise OSError(f"cannot write to --output_dir {folder}: {error.strerror or error}") from error
    try:
        if (known := _read(folder)) and known.get("host") != socket.gethostname():
            raise FolderInUseError(
                f"{folder} is held by {_holder(folder)}, another machine: choose another --output_dir, or, "
                f"if nothing runs there any more, remove {folder / HOLDER}"
            )
        write_text(folder / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        try:
            yield
        finally:
            (folder / HOLDER).unlink(missing_ok=True)
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        for path in made:
            with suppress(OSError):  # something is in it
                path.rmdir()


def _holder(folder: Path) -> str:
    known = _read(folder)
    return f"process {known.get('pid')} on {known.get('host')}" if known else "another process"


def _read(folder: Path) -> dict[str, object]:
    try:
        known = parse_json(read_bytes(folder / HOLDER))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
