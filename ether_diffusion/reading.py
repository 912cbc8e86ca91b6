"""Reading what others wrote, within bounds: regular files only, so many bytes, JSON that cannot exhaust the stack."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

KINDS = (
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISDIR, "a folder"),
)
TEXT_LIMIT = 256 * 2**20
"""Bytes of a listing or a record; one million lines of metadata.jsonl have some 200 MB."""


class NotARegularFileError(OSError):
    """A named pipe, socket or device: reading it could last for ever."""


def check_regular(path: str | Path) -> None:
    """Refuse what is no regular file, links looked through. Nothing is opened.

    Raises:
        NotARegularFileError: it is a pipe, a socket, a device or a folder; the message names it.
        OSError: there is nothing, or it may not be looked at.
    """
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in KINDS if is_kind(mode)), "no regular file")
        raise NotARegularFileError(f"{path} is {kind}, where a regular file is expected")


def read_bytes(path: str | Path, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        ValueError: it is larger.
        OSError: it is no regular file, or cannot be read.
    """
    check_regular(path)
    with Path(path).open("rb") as file:
        content = file.read(limit + 1)  # a file of /proc has size 0 and any content
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes, the most that is read")
    return content


def read_text(path: str | Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a regular UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8, or too large; the message names it.
        OSError: it is no regular file, or cannot be read.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or names a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def shown(value: object, limit: int = 80) -> str:
    """A value for a message: short, on one line, without control characters; of a container its type alone."""
    if value is not None and not isinstance(value, str | int | float):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 256:
        return "an enormous number"
    text = repr(value if not isinstance(value, str) else value[: limit + 1])
    return text if len(text) <= limit else f"{text[:limit]}…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the JSON names {shown(next(key for key in keys if keys.count(key) > 1))} twice")
    return found
