"""Pictures inside a page, as data URIs, and sheets of pictures as files."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from ether_diffusion.files import atomic_path
from ether_diffusion.images import MissingDecoderError, prepare_decoder

SIDE, GAP, TITLE = 96, 4, 18
"""Pixels of a grid: side of a picture, space between two, height of a line of text."""


@dataclass(frozen=True)
class Picture:
    """A thumbnail: ``source`` is a data URI, or ``None`` where the file is missing or cannot be read."""

    source: str | None
    alt: str
    caption: str


def thumbnail(path: Path, size: int) -> str | None:
    """The picture within ``size`` by ``size`` pixels as a WebP data URI; ``None`` if it cannot be read."""
    try:
        prepare_decoder(path)
        with Image.open(path) as image:
            return data_uri(ImageOps.exif_transpose(image), size)
    except (OSError, MissingDecoderError):
        return None


def data_uri(image: Image.Image, size: int, flat: bool = False, kind: Literal["webp", "jpeg"] = "webp") -> str:
    """A picture within ``size`` by ``size`` pixels as a data URI.

    Args:
        image: is seen in RGB.
        size: of the longer side at most, in pixels.
        flat: whether it has areas of one colour, as maps have: it is shrunk to the nearest, and as WebP kept without
            losses.
        kind: of file.
    """
    small = image.convert("RGB")
    small.thumbnail((size, size), Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=82, lossless=flat)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def picture_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], heads: Sequence[str]) -> Image.Image:
    """Rows of pictures, each under its name, with a head over every column; small ones are magnified by pixels.

    A head may have several lines.
    """
    columns = max([len(heads), *(len(pictures) for _, pictures in rows)])
    above = TITLE * max([1, *(head.count("\n") + 1 for head in heads)])
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, above + len(rows) * (TITLE + SIDE + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, head in enumerate(heads):
        pen.text((GAP + column * (SIDE + GAP), 3), head, fill="#66676e", font=font)
    for number, (title, pictures) in enumerate(rows):
        top = above + number * (TITLE + SIDE + GAP)
        pen.text((GAP, top + 2), title, fill="#1c1d21", font=font)
        for column, picture in enumerate(pictures):
            small = max(picture.size) < SIDE
            method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            sheet.paste(picture.convert("RGB").resize((SIDE, SIDE), method), (GAP + column * (SIDE + GAP), top + TITLE))
    return sheet


def save_picture(picture: Image.Image, path: Path, facts: Mapping[str, object] | None = None) -> None:
    """Write a PNG atomically, with facts about it in its text chunks: text as it is, all else as JSON."""
    chunks = PngInfo()
    for key, value in (facts or {}).items():
        chunks.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=chunks)


def shared_size(count: int, largest: int, at_most: int) -> int:
    """Pixels of the longer side of each of ``count`` pictures of a page.

    Args:
        count: how many pictures share the page.
        largest: pixels that a side has at most.
        at_most: so many pictures may have it; more of them get as many pixels as these, all together.
    """
    return min(largest, round(largest * math.sqrt(at_most / max(1, count))))
