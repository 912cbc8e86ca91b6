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
            small = ImageOps.exif_transpose(image).convert("RGB")
    except OSError:
        return None
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
