"""The listings of an image folder, ``metadata.jsonl`` and ``metadata.csv``, in the convention of 🤗 Datasets.

A row names a file by its path inside of the folder, and its caption: ``{"file_name": "a.png", "text": "a dog"}``.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ether_diffusion.images import check_folder, is_text
from ether_diffusion.reading import parse_json, read_lines, read_text, shown

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"
SHOWN_PROBLEMS = 8
SHOWN_LENGTH = 200
"""Characters of a name in a message."""
ALLOW_OUTSIDE = "move the file there, or allow such names with --allow_outside_paths"


@dataclass(frozen=True)
class Row:
    """One row of a listing.

    Attributes:
        where: the file and the line, for messages.
        values: by column.
        text: the row as it stands in the file.
    """

    where: str
    values: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Metadata:
    """The listing of a folder.

    Attributes:
        path: the file.
        captions: of every picture that it names, by its path in the folder; none where the cell is empty.
        where: the file and line of every picture, for messages.
    """

    path: Path
    captions: dict[str, tuple[str, ...]]
    where: dict[str, str]


def read_rows(listing: Path, expected: str) -> Iterator[Row]:
    """The rows of a listing in their order; CSV where its name ends so, JSON in lines otherwise.

    Args:
        listing: the file.
        expected: what a row looks like, for messages.

    Raises:
        ValueError: a row is no JSON object, or has another number of cells than the header.
        OSError: the listing is no regular file, or cannot be read.
    """
    return _csv_rows(listing) if listing.suffix.lower() == ".csv" else _json_rows(listing, expected)


def read_metadata(folder: Path, column: str) -> Metadata | None:
    """The captions in a folder's ``metadata.jsonl`` or ``metadata.csv``; None where it has neither.

    Args:
        folder: of the pictures.
        column: of the captions. In JSON a value may be a list of several captions.

    Raises:
        ValueError: both files are there, a row is not what it should be, a column or a file is missing, a picture is
            named twice, or a name leads out of the folder.
        OSError: the listing is no regular file, or cannot be read.
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    found = [folder / name for name in METADATA if (check_folder(folder) / name).exists()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds both {' and '.join(METADATA)}: remove one of them")
    if not found:
        return None
    (listing,) = found
    captions: dict[str, tuple[str, ...]] = {}
    where: dict[str, str] = {}
    missing = []
    for row in read_rows(listing, f'{{"{FILE_NAME}": …, "{column}": …}}'):
        given = _cell(row, FILE_NAME, ": rename it, or move the file away if it does not list these pictures")
        if not isinstance(given, str) or not given.strip():
            raise ValueError(f"{row.where}: {FILE_NAME} is {shown(given)}, the name of a file is expected")
        check_inside(given, row.where, "move the file there")
        name = PurePosixPath(given).as_posix()
        if name in captions:
            raise ValueError(f"{row.where} names {given[:SHOWN_LENGTH]}, which {where[name]} names already: keep one")
        if not os.path.isfile(folder / name) or is_text(name) or name in METADATA:
            missing.append(f"{row.where}: {given[:SHOWN_LENGTH]}")
        try:
            captions[name] = stripped(captions_of(_cell(row, column, "; name yours with --caption_column")))
        except TypeError as error:
            raise ValueError(f"{row.where}: {error}") from error
        where[name] = row.where
    if missing:
        listed = "\n".join(f"  {each}" for each in missing[:SHOWN_PROBLEMS])
        rest = f"\n  … and {len(missing) - SHOWN_PROBLEMS} more" if len(missing) > SHOWN_PROBLEMS else ""
        raise ValueError(f"{listing} names {len(missing)} pictures that are not in {folder}:\n{listed}{rest}")
    if not captions:
        raise ValueError(f"{listing} is empty: it should have a row for each picture")
    return Metadata(listing, captions, where)


def check_inside(name: str | None, where: str, remedy: str = ALLOW_OUTSIDE) -> None:
    """Refuse the name of a file that leads out of the folder whose listing names it.

    Raises:
        ValueError: it is absolute, or goes up with ``..``.
    """
    if name and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise ValueError(f"{where} names {name[:SHOWN_LENGTH]}, which is not inside of the folder: {remedy}")


def captions_of(value: object) -> tuple[str, ...]:
    """The captions that a row gives: a text, a list of texts, or none, which is one empty caption.

    Raises:
        TypeError: it is neither, or a text is no Unicode.
    """
    values = value if isinstance(value, list | tuple) else [value]
    if wrong := [each for each in values if each is not None and not isinstance(each, str | int | float)]:
        raise TypeError(f"a caption is a text or a list of texts, not a {type(wrong[0]).__name__}")
    captions = tuple("" if each is None else str(each) for each in values) or ("",)
    if broken := [each for each in captions if not each.isprintable() and _is_broken(each)]:
        raise TypeError(f"the caption {shown(broken[0])} has half of a character")
    return captions


def _is_broken(text: str) -> bool:
    """Whether a text of JSON has a lone surrogate, with which it is no Unicode."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def stripped(captions: tuple[str, ...]) -> tuple[str, ...]:
    """The captions without the space around them, without empty ones, and each once."""
    return tuple(dict.fromkeys(text for each in captions if (text := each.strip())))


def _cell(row: Row, column: str, remedy: str) -> Any:
    if column not in row.values:
        columns = ", ".join(map(str, row.values))[:SHOWN_LENGTH]
        raise ValueError(f"{row.where} has no column {column!r} but {columns or 'none'}{remedy}")
    return row.values[column]


def _json_rows(listing: Path, expected: str) -> Iterator[Row]:
    for number, line in read_lines(listing):
        where = f"{listing}, line {number}"
        try:
            values = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: {expected} is expected, not {line[:80]}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {expected} is expected, not {line[:80]}")
        yield Row(where, values, line)


def _csv_rows(listing: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(read_text(listing), newline=""), strict=True)
    header: list[str] = []
    while True:
        where = f"{listing}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{where} is no CSV that can be read ({error})") from error
        if cells is None:
            return
        if not any(cells):
            continue
        if not header:
            header = [name.strip() for name in cells]
            _check_header(header, where)
        elif len(cells) != len(header):
            raise ValueError(
                f"{where} has {len(cells)} cells, the header {len(header)}: a caption with commas is put in quotes, "
                'a.png,"a dog, grass"'
            )
        else:
            yield Row(where, dict(zip(header, cells, strict=True)), json.dumps(cells, ensure_ascii=False))


def _check_header(header: list[str], where: str) -> None:
    if twice := [name for name, times in Counter(header).items() if times > 1]:
        raise ValueError(f"{where} names the column {shown(twice[0])} twice")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        raise ValueError(f"{where} is {shown(header[0])}: columns are separated by commas")
