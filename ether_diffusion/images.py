"""Picture files and their captions: whatever a camera or a painting program saves becomes 8-bit RGB."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ether_diffusion.reading import check_regular, read_text

logger = logging.getLogger(__name__)

PIXEL_LIMIT = 105_000_000
"""Of a picture, as it is stored and after it was scaled: the largest cameras have 102 million."""
ASPECT_LIMIT = 64
"""Long side to short side: what is longer would be scaled to gigabytes."""
REFUSED_FORMATS = ("EPS",)
"""Pillow runs another program, Ghostscript, to draw these."""
CAPTION_SUFFIXES = (".txt", ".TXT", ".Txt")
CAPTION_LIMIT = 2**20
"""Bytes of a caption."""
OTHER_TEXTS = ("prompt.txt",)
"""Texts in a folder of pictures that other parts of the toolkit read."""

DECODING_ERRORS = (
    OSError,  # truncated data, and UnidentifiedImageError
    SyntaxError,  # Pillow's word for a broken PNG or TIFF
    ValueError,
    EOFError,
    struct.error,
    LookupError,  # of chunks that are too short, tags that are missing
    TypeError,
    ArithmeticError,
    NotImplementedError,
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
    check_regular(path)
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:
            check_picture(image)
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{path}: not a picture in a format that Pillow reads") from error
    except (FileNotFoundError, PermissionError):
        raise
    except DECODING_ERRORS as error:
        raise UnreadableImageError(f"{path}: cannot be decoded ({error}); save the picture again") from error


def check_picture(image: Image.Image) -> None:
    """Refuse what would take gigabytes or another program to decode or to scale, by its header alone.

    Raises:
        ValueError: the picture has too many pixels, is too long for its width, or is a program in PostScript.
    """
    width, height = image.size
    if image.format in REFUSED_FORMATS:
        raise ValueError(f"{image.format} is a program that draws a picture, which is not run; give a PNG of it")
    if width * height > PIXEL_LIMIT:
        raise ValueError(f"{width} x {height} pixels; at most {PIXEL_LIMIT:,} are read: scale the picture down")
    if max(width, height) > ASPECT_LIMIT * min(width, height):
        raise ValueError(f"{width} x {height} pixels: one side is over {ASPECT_LIMIT} times the other; cut the picture")


def list_images(folder: str | Path) -> list[Path]:
    """Return the pictures directly in ``folder``, sorted by name; each has been decoded once, in full.

    Sub-folders and captions are passed over; any other file that is hidden or is no whole picture is left out with a
    logged warning that names it. A text that is no picture's caption is warned of, too.

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
    _warn_of_unread_texts(folder)
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
    """Return the stripped text beside a picture, of ``a.txt`` or ``a.jpg.txt`` for ``a.jpg``; None where there is none.

    Raises:
        ValueError: the caption is not UTF-8, or both files are there and differ.
    """
    image_path = Path(image_path)
    found = [path for name in _caption_names(image_path) if (path := image_path.with_name(name)).exists()]
    texts = {text: path for path in reversed(found) if (text := read_text(path, CAPTION_LIMIT).strip())}
    if len(texts) > 1:
        names = " and ".join(sorted(path.name for path in texts.values()))
        raise ValueError(f"{image_path} has several captions that differ, {names}: remove all but one")
    return next(iter(texts), None)


def _warn_of_unread_texts(folder: Path) -> None:
    """Name the texts in a folder that are the caption of no file there: a misspelt caption is not lost in silence."""
    names = sorted(path.name for path in folder.iterdir())
    texts = [name for name in names if name.lower().endswith(".txt")]
    captions = {caption for name in names if name not in texts for caption in _caption_names(folder / name)}
    if unread := [name for name in texts if name not in captions and name not in OTHER_TEXTS]:
        logger.warning(
            "no caption of any picture, and not read: %s in %s; a caption is called as its picture is: a.txt or "
            "a.jpg.txt for a.jpg",
            ", ".join(unread[:8]) + ("" if len(unread) <= 8 else f" and {len(unread) - 8} more"),
            folder,
        )


def _caption_names(image_path: Path) -> list[str]:
    """What the caption of a picture may be called."""
    return [f"{stem}{suffix}" for stem in (image_path.stem, image_path.name) for suffix in CAPTION_SUFFIXES]


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
    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values from {values.min()} to {values.max()}, expected 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
