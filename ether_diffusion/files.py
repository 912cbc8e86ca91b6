"""Atomic files: what is on disk is always either the old file or the whole new one."""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_path(path: str | Path) -> Iterator[Path]:
    """As :func:`atomic_path` for a file that must not be there yet, not even since the caller looked.

    Raises:
        FileExistsError: ``path`` is there when the file is to get its name; it stays as it is.
        OSError: the parent folder cannot be made or written.
    """
    path = Path(path)
    taken = FileExistsError(f"{path} is there already: name another file, or remove it")
    with _temporary(path) as temporary:
        yield temporary
        _sync(temporary)
        try:
            os.link(temporary, path)  # unlike a rename it replaces nothing
        except FileExistsError:
            raise taken from None
        except OSError:  # a file system without links
            if path.exists():
                raise taken from None
            os.replace(temporary, path)
        _sync(path.parent)


@contextmanager
def atomic_path(path: str | Path, beside: Sequence[Path] | None = None) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success :func:`commit` what was written there to ``path``.

    The body may write a file or make a folder under the temporary name. If it raises, or the process dies,
    ``path`` keeps its old content.

    Args:
        path: the file or folder.
        beside: of a folder the files that it is going to have; what else is in it then stays.

    Raises:
        OSError: the parent folder cannot be made or written.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        yield temporary
        if beside is None:
            commit(temporary, path)
        else:
            commit_beside(temporary, path, beside)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside ``path``, under which nothing is left in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        _remove(temporary)


def commit(temporary: Path, path: Path) -> None:
    """Sync a finished file or folder to the disk and rename it to ``path``, replacing what is there.

    A rename cannot replace a folder, so two folders are exchanged in one step; where the system cannot do that (Linux
    can) the old one is moved aside first, and a process killed just then leaves it as ``.<name>.<id>.old``.
    """
    _sync_tree(temporary)
    retired = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    if not (temporary.is_dir() and path.is_dir()):
        os.replace(temporary, path)
    elif _exchange(temporary, path):
        retired = temporary
    else:
        os.replace(path, retired)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(retired, path)
            raise
    _sync(path.parent)
    _remove(retired)


def commit_beside(temporary: Path, path: Path, files: Sequence[Path]) -> None:
    """:func:`commit` a finished folder; where ``path`` has other files than these, move them one by one beside those.

    Args:
        temporary: the finished folder.
        path: its name.
        files: of the folder, relative to it, in the order in which they get their names.
    """
    inside = [file.relative_to(path) for file in path.rglob("*") if not file.is_dir()] if path.is_dir() else []
    if path.is_symlink() or set(inside) <= set(files):
        commit(temporary, path)
        return
    _sync_tree(temporary)
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / file, path / file)
    _sync(path)
    _remove(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically; the folder is made if it is missing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux' renameat2); False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
