"""Atomic files: what is on disk is always either the old file or the whole new one."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success sync what was written there and rename it to ``path``.

    The body may write a file or make a folder under the temporary name. If it raises, or the process dies,
    ``path`` keeps its old content. A folder replaces an existing folder.

    Raises:
        OSError: the parent folder cannot be made or written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex
    temporary = path.with_name(f".{path.name}.{unique}.tmp")
    retired = path.with_name(f".{path.name}.{unique}.old")
    try:
        yield temporary
        _sync_tree(temporary)
        if temporary.is_dir() and path.is_dir():  # a rename cannot replace a folder that holds something
            os.replace(path, retired)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        for leftover in (temporary, retired):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically; the folder is made if it is missing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
