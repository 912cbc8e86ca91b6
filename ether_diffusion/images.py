"""Picture files and their captions: whatever a camera or a painting program saves becomes 8-bit RGB."""

from __future__ import annotations

import io
import logging
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

logger = logging.getLogger(__name__)

DECODING_ERRORS = (
    OSError,  # truncated data, and UnidentifiedImageError
    SyntaxError,  # Pillow's word for a broken PNG or TIFF
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for a broken file, whatever its format."""


class UnreadableImageError(ValueError):
    """A file that is no picture, or is one that cannot be decoded to its end."""


def load_image(path: str | Path) -> Image.Image:
    """Decode the picture at ``path`` fully to 8-bit RGB, turned upright as its EXIF orientation says.

    Transparent pixels are composited on white; 16-bit grey is scaled (value / 257); of a file with several
    pictures (MPO, GIF) the first is taken.

    Raises:
        UnreadableImageError: the file is no picture or is broken; the message names it and says why.
        OSError: the file cannot be opened (``FileNotFoundError``, ``PermissionError``).
    """
    content = Path(path).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{path}: not a picture in a format that Pillow reads") from error
    except DECODING_ERRORS as error:
        raise UnreadableImageError(f"{path}: cannot be decoded ({error}); save the picture again") from error


def list_images(folder: str | Path) -> list[Path]:
    """Return the pictures directly in ``folder``, sorted by name; each has been decoded once, in full.

    Sub-folders and ``.txt`` captions are passed over; any other file that is hidden or is no whole picture is
    left out with a logged warning that names it.

    Raises:
        FileNotFoundError: ``folder`` does not exist.
        NotADirectoryError: ``folder`` is a file.
        ValueError: ``folder`` holds no readable picture.
    """
    folder = check_folder(folder)
    paths = [path for path in sorted(folder.iterdir(), key=lambda path: path.name) if _is_readable(path)]
    if not paths:
        raise ValueError(
            f"no readable picture directly in {folder} (sub-folders are not searched); "
            "put .jpg, .png or .webp files there"
        )
    return paths


def check_folder(folder: str | Path) -> Path:
    """Return ``folder`` if it is one.

    Raises:
        FileNotFoundError: it does not exist.
        NotADirectoryError: it is a file.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"image folder {folder} does not exist; check the path")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give the folder that holds the pictures")
    return folder


def load_caption(image_path: str | Path) -> str | None:
    """Return the stripped text of the ``.txt`` file beside a picture; ``None`` where it is missing or empty.

    Raises:
        ValueError: the caption is not UTF-8.
    """
    caption_path = Path(image_path).with_suffix(".txt")
    if not caption_path.is_file():
        return None
    try:
        return caption_path.read_text(encoding="utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise ValueError(f"caption {caption_path} is not UTF-8 ({error}); save it as UTF-8") from error


def _is_readable(path: Path) -> bool:
    if path.is_dir() or path.suffix.lower() == ".txt":
        return False
    if path.name.startswith("."):
        logger.warning("skipping %s: a hidden file", path)
        return False
    try:
        load_image(path)
    except (UnreadableImageError, OSError) as error:
        logger.warning("skipping %s", error)
        return False
    return True


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, which Pillow may also hold in 32 bits, to 8; ``convert`` would clip it at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values from {values.min()} to {values.max()}, expected 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
