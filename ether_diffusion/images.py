"""Picture files and their captions: whatever a camera or a painting program saves becomes 8-bit RGB."""

from __future__ import annotations

import importlib
import logging
import os
import re
import struct
from collections.abc import Iterable
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
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
AVIF_BRANDS = (b"avif", b"avis")
"""Names of the formats at the start of a file, from byte 8 on."""

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


class MissingDecoderError(ImportError):
    """A picture in a format that an optional package reads; the message says how to install it."""


def load_image(path: str | Path) -> Image.Image:
    """Decode the picture at ``path`` fully to 8-bit RGB, turned upright as its EXIF orientation says.

    Transparent pixels are composited on white; 16-bit grey is scaled (value / 257); of a file with several
    pictures (MPO, GIF) the first is taken.

    Raises:
        UnreadableImageError: the file is no picture or is broken; the message names it and says why.
        MissingDecoderError: it is a HEIC or AVIF file, and what reads it is not installed.
        OSError: the file cannot be opened (``FileNotFoundError``, ``PermissionError``).
    """
    check_regular(path)
    prepare_decoder(path)
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


def prepare_decoder(path: str | Path) -> None:
    """Let Pillow read HEIC files, if ``path`` is one.

    Raises:
        MissingDecoderError: it is a HEIC or AVIF file, and what reads it is not installed.
        OSError: the file cannot be opened.
    """
    with Path(path).open("rb") as file:
        head = file.read(64)
    if head[4:8] != b"ftyp":
        return
    end = min(len(head), int.from_bytes(head[:4], "big"))
    brands = {head[place : place + 4] for place in range(8, end, 4)}
    is_avif = not brands.isdisjoint(AVIF_BRANDS)
    if is_avif and ".avif" not in Image.registered_extensions():
        raise MissingDecoderError(f"{path} is an AVIF file, which Pillow reads from 11.3 on: pip install -U pillow")
    if not is_avif and (Path(path).suffix.lower() in HEIF_SUFFIXES or not brands.isdisjoint(HEIF_BRANDS)):
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError as error:
            raise MissingDecoderError(
                f"{path} is a HEIC file, which pillow-heif reads ({error}): pip install 'ether-diffusion[heic]'"
            ) from error


def is_text(name: str | Path) -> bool:
    """Whether a file is called as a text is, and so is no picture."""
    return Path(name).suffix.lower() == ".txt"


def is_picture_name(path: Path) -> bool:
    """Whether a file that is not hidden is called as a picture is."""
    suffix = path.suffix.lower()
    return not path.name.startswith(".") and (suffix in HEIF_SUFFIXES or suffix in Image.registered_extensions())


def list_images(
    folder: str | Path, nested: bool = False, more: Iterable[Path] = (), without: Path | None = None
) -> list[Path]:
    """The pictures in ``folder``, as :func:`sort_files` finds them, with the same arguments and errors."""
    return sort_files(folder, nested, more, without)[0]


def sort_files(
    folder: str | Path, nested: bool = False, more: Iterable[Path] = (), without: Path | None = None
) -> tuple[list[Path], list[Path]]:
    """The pictures in ``folder`` and the files that are none, sorted by their paths in it.

    Each picture has been decoded once, in full. Captions are passed over; any other file that is hidden or is no whole
    picture is left out with a logged warning that names it. A text that is no picture's caption is warned of, too.

    Args:
        folder: of the pictures.
        nested: whether sub-folders are searched, too; hidden ones and links to folders are not.
        more: pictures in sub-folders that belong to it in any case.
        without: a file in it that something else reads.

    Raises:
        FileNotFoundError: ``folder`` does not exist.
        NotADirectoryError: ``folder`` is a file.
        ValueError: ``folder`` holds no readable picture.
        MissingDecoderError: a file is HEIC or AVIF, and what reads it is not installed.
    """
    folder = check_folder(folder)
    found = [path for path in {*list_files(folder, nested), *more} if not is_text(path) and path != without]
    found.sort(key=lambda path: path.relative_to(folder).as_posix())
    paths: list[Path] = []
    left_out: list[Path] = []
    for path in found:
        (paths if _is_readable(path) else left_out).append(path)
    if not paths:
        where = f"in {folder} and its sub-folders" if nested else f"directly in {folder} (sub-folders are not searched)"
        inside = [path for path in list_files(folder, nested=True) if is_picture_name(path)]
        advice = "put .jpg, .png or .webp files there"
        if inside and not nested:
            advice += f"; {len(inside)} pictures are in sub-folders: move them up, or add --nested_folders to "
            advice += "train_dreambooth.py"
        raise ValueError(f"no readable picture {where}; {advice}")
    if left_out:
        logger.info("%d of %d files in %s are left out", len(left_out), len(found), folder)
    for place in dict.fromkeys([folder, *(path.parent for path in paths)]):
        _warn_of_unread_texts(place)
    return paths, left_out


def list_files(folder: Path, nested: bool = False) -> list[Path]:
    """What is in a folder and no folder; if ``nested``, in its sub-folders, too, but not in hidden or linked ones."""
    if not nested:
        return [path for path in folder.iterdir() if not path.is_dir()]
    found = []
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not Path(place, name).is_dir()]
    return found


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


def load_captions(image_path: str | Path) -> tuple[str, ...]:
    """The captions beside a picture: the lines of ``a.txt`` or ``a.jpg.txt`` for ``a.jpg``, stripped, each once.

    Raises:
        ValueError: the text is not UTF-8, or both files are there and differ.
    """
    image_path = Path(image_path)
    found = [path for name in _caption_names(image_path) if (path := image_path.with_name(name)).exists()]
    texts = {text: path for path in reversed(found) if (text := read_text(path, CAPTION_LIMIT).strip())}
    if len(texts) > 1:
        names = " and ".join(sorted(path.name for path in texts.values()))
        raise ValueError(f"{image_path} has several captions that differ, {names}: remove all but one")
    lines = re.split("\r\n|\n|\r", next(iter(texts), ""))
    return tuple(dict.fromkeys(text for line in lines if (text := line.strip())))


def _refuse(error: OSError) -> None:
    """A sub-folder that cannot be read is not left out in silence."""
    raise error


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
