"""Pictures inside a page: thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps


@dataclass(frozen=True)
class Picture:
    """A thumbnail: ``source`` is a data URI, or ``None`` where the file is missing or cannot be read."""

    source: str | None
    alt: str
    caption: str


def thumbnail(path: Path, size: int) -> str | None:
    """The picture within ``size`` by ``size`` pixels as a WebP data URI; ``None`` if it cannot be read."""
    try:
        with Image.open(path) as image:
            return data_uri(ImageOps.exif_transpose(image), size)
    except OSError:
        return None


def data_uri(image: Image.Image, size: int, flat: bool = False) -> str:
    """A picture within ``size`` by ``size`` pixels as a WebP data URI.

    Args:
        image: is seen in RGB.
        size: of the longer side at most, in pixels.
        flat: whether it has areas of one colour, as maps have: it is shrunk to the nearest and kept without losses.
    """
    small = image.convert("RGB")
    small.thumbnail((size, size), Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82, lossless=flat)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
