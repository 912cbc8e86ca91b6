"""Reading what others wrote, within bounds: regular files only, so many bytes, JSON that cannot exhaust the stack."""

from __future__ import annotations

import json
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NotRequired, get_args, get_origin, get_type_hints, is_typeddict

import yaml

KINDS = (
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISDIR, "a folder"),
)
MAX_FLOAT = sys.float_info.max
TEXT_LIMIT = 256 * 2**20
"""Bytes of a listing or a record; one million lines of metadata.jsonl have some 200 MB."""


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Knows no tags of Python; the one in C is ten times as fast, and not in every build of PyYAML."""
YAML_LIMIT, YAML_DEPTH, YAML_NODES = 2**18, 32, 100_000
"""Bytes of a YAML file, how deep it may be nested, and how many values it may have once its aliases are expanded."""


class DamagedFileError(ValueError):
    """A file that this toolkit wrote is damaged; the message names it and says what is wrong."""


class NotARegularFileError(OSError, ValueError):
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


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1.

    Lines end as those of an editor do; a line separator of Unicode inside of a JSON string is a part of it.

    Raises:
        ValueError: the file is not UTF-8, or too large.
        OSError: it is no regular file, or cannot be read.
    """
    for number, line in enumerate(re.split("\r\n|\n|\r", read_text(path)), 1):
        if line.strip():
            yield number, line


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file without tags of Python.

    Raises:
        ValueError: it is no YAML, too large, nested too deeply, or its aliases make it enormous; the message names it.
        OSError: it is no regular file, or cannot be read.
    """
    text = read_text(path, YAML_LIMIT)
    try:
        _check_yaml(text)
        return yaml.load(text, LOADER)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is no YAML that can be read: {' '.join(str(error).split())}") from error


def _check_yaml(text: str) -> None:
    """Count the values of a YAML text with all aliases expanded, without expanding them."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > YAML_DEPTH:
                raise ValueError(f"it is nested more than {YAML_DEPTH} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if size > YAML_NODES:
            raise ValueError(f"its aliases make it larger than {YAML_NODES:,} values")
        if open_nodes:
            parent, so_far = open_nodes[-1]
            open_nodes[-1] = parent, so_far + size


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or names a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def read_json(path: str | Path, kind: Any) -> Any:
    """The value of a JSON file that this toolkit wrote.

    Args:
        path: of the file.
        kind: the type that it holds, as :func:`matches` takes it.

    Raises:
        DamagedFileError: it is no such JSON; the message names the file.
        OSError: it is no regular file, or cannot be read.
    """
    try:
        found = parse_json(read_text(path))
    except OSError:
        raise
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise DamagedFileError(f"{path} is damaged ({reason})") from error
    if not matches(found, kind):
        raise DamagedFileError(f"{path} is damaged: {_misfit(found, kind)}")
    return found


def _misfit(found: object, kind: Any) -> str:
    """Why a value is not of a type: the key of a TypedDict that is missing or holds another type, or what it holds."""
    if is_typeddict(kind) and isinstance(found, dict):
        for key, hint in get_type_hints(kind, include_extras=True).items():
            inner = get_args(hint)[0] if get_origin(hint) is NotRequired else hint
            if key in found and not matches(found[key], inner):
                return f"its {key} is {shown(found[key])}"
            if key not in found and inner is hint:
                return f"it has no {key}"
    expected = "settings and facts by name" if is_typeddict(kind) or kind is dict else kind
    return f"it holds {shown(found)}, expected {getattr(expected, '__name__', expected)}"


def matches(value: object, kind: Any) -> bool:
    """Whether a value read from JSON is of a type such as ``dict[str, list[float]] | None``, or of a TypedDict.

    A float is finite; keys that a TypedDict does not have are allowed.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(matches(value, each) for each in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(matches(each, arguments[1]) for each in value.values())
    if origin is list:
        return isinstance(value, list) and all(matches(each, arguments[0]) for each in value)
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        optional = {key for key, hint in hints.items() if get_origin(hint) is NotRequired}
        return isinstance(value, dict) and all(
            matches(value[key], get_args(hint)[0] if key in optional else hint) if key in value else key in optional
            for key, hint in hints.items()
        )
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, NoneType if kind is None else kind)


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
        times = Counter(key for key, _ in pairs)
        raise ValueError(f"the JSON names {shown(next(key for key in times if times[key] > 1))} twice")
    return found
