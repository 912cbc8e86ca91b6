"""Conditions as files and pictures: semantic maps of class ids, the colours that show them, canny edges."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ether_diffusion.images import DECODING_ERRORS, UnreadableImageError, check_picture, load_image
from ether_diffusion.reading import check_regular, read_bytes

CANNY_LOW, CANNY_HIGH = 100, 200
"""ControlNet's thresholds of the gradient's magnitude, |dx| + |dy| of 3 x 3 Sobel filters on 8 bits."""
_PNG_DEPTH, _PNG_COLOUR = 24, 25
"""Where a PNG keeps its bits per sample and its colour type, 0 for grey."""
COLOURED = ("P", "RGB", "RGBA", "PA", "CMYK")
"""Modes of pictures that have colours of their own; the others hold class ids where a map is expected."""
_LOSSY = ("JPEG", "MPO", "JPEG2000")


def _voc_colour(index: int) -> tuple[int, int, int]:
    """Bits 0, 3, 6 of the index become red's highest ones, 1, 4, 7 green's, 2, 5 blue's: Pascal VOC's colours."""
    red, green, blue = (
        sum((index >> (3 * place + channel) & 1) << (7 - place) for place in range(3)) for channel in range(3)
    )
    return red, green, blue


MAP_PALETTE: tuple[tuple[int, int, int], ...] = tuple(_voc_colour(index) for index in range(256))
"""The colour of every class id, (256, 3): all different, the same for ever."""


def load_map(path: str | Path) -> NDArray[np.int64]:
    """The class ids of a semantic map, (H, W): a palette PNG's indices, or the values of a grey one of 1 to 16 bits.

    Raises:
        UnreadableImageError: the file is no picture, is broken, holds colours, or was saved with losses.
        OSError: the file cannot be opened (``FileNotFoundError``, ``PermissionError``).
    """
    content = read_bytes(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            check_picture(image)
            kind, mode = image.format, image.mode
            upright = ImageOps.exif_transpose(image)
            if mode not in ("P", "L", "1", "I") and not mode.startswith("I;16"):
                raise UnreadableImageError(
                    f"{path}: a semantic map holds one class id per pixel, this is a picture in {mode}; "
                    "save it as a palette PNG whose indices are the ids, or as a grey PNG of the ids"
                )
            if kind in _LOSSY:
                raise UnreadableImageError(f"{path}: {kind} does not keep class ids; save the map as PNG")
            ids = np.asarray(upright).astype(np.int64)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{path}: not a picture in a format that Pillow reads") from error
    except DECODING_ERRORS as error:
        if isinstance(error, UnreadableImageError):
            raise
        raise UnreadableImageError(f"{path}: cannot be decoded ({error}); save the map again") from error
    if kind == "PNG" and mode == "L" and content[_PNG_COLOUR] == 0:
        ids //= 255 // (2 ** content[_PNG_DEPTH] - 1)  # Pillow stretches 2 and 4 bits to 0 … 255
    if ids.min() < 0:
        raise UnreadableImageError(f"{path}: class ids from {ids.min()}, expected none below 0")
    return ids


def colour_map(ids: NDArray[np.integer]) -> Image.Image:
    """A map of class ids (H, W) as an RGB picture in :data:`MAP_PALETTE`'s colours.

    Raises:
        ValueError: it is not two-dimensional, or an id is not from 0 to 255.
    """
    _check_ids(ids)
    return Image.fromarray(np.array(MAP_PALETTE, np.uint8)[ids])


def map_picture(image: Image.Image) -> Image.Image:
    """A semantic map in memory as the model is to see it, RGB: grey class ids in colours, a palette as it looks.

    Raises:
        ValueError: an id has no colour.
    """
    if image.mode in COLOURED:
        return image.convert("RGB")
    return colour_map(np.asarray(image).astype(np.int64))


def load_condition(path: str | Path, is_map: bool) -> Image.Image:
    """A condition as the model is to see it, RGB: a picture as it looks, a map of grey class ids in colours.

    Raises:
        UnreadableImageError: the file is broken, or the map holds class ids without a colour.
        OSError: the file cannot be opened.
    """
    try:
        return colour_map(load_map(path)) if is_map and not _is_coloured(path) else load_image(path)
    except ValueError as error:
        raise error if isinstance(error, UnreadableImageError) else UnreadableImageError(f"{path}: {error}") from error


def _is_coloured(path: str | Path) -> bool:
    check_regular(path)
    with Image.open(path) as image:
        return image.mode in COLOURED


def palette_map(ids: NDArray[np.integer]) -> Image.Image:
    """A map of class ids (H, W) as a palette image: its indices are the ids, its colours :data:`MAP_PALETTE`'s.

    Raises:
        ValueError: it is not two-dimensional, or an id is not from 0 to 255.
    """
    _check_ids(ids)
    height, width = ids.shape
    image = Image.frombytes("P", (width, height), ids.astype(np.uint8).tobytes())
    image.putpalette([channel for colour in MAP_PALETTE for channel in colour])
    return image


def canny(image: Image.Image, low: float = CANNY_LOW, high: float = CANNY_HIGH) -> Image.Image:
    """White edges on black, RGB, as ControlNet has them: OpenCV's ``Canny`` on the RGB values.

    Args:
        image: is seen in RGB.
        low: threshold of pixels that only go on with an edge.
        high: threshold of pixels that begin one.

    Raises:
        ImportError: OpenCV is not installed.
        ValueError: the thresholds are not 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise ValueError(f"canny's thresholds must be 0 <= low <= high, not {low:g} and {high:g}")
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"canny edges need OpenCV ({error}): pip install 'ether-diffusion[control]'") from error
    edges = np.asarray(cv2.Canny(np.asarray(image.convert("RGB")), low, high))
    return Image.fromarray(edges).convert("RGB")


def _check_ids(ids: NDArray[np.integer]) -> None:
    if ids.ndim != 2:
        raise ValueError(f"a map of class ids has a height and a width, not the shape {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= len(MAP_PALETTE)):
        raise ValueError(f"there are colours for the class ids 0 to 255, the map's go from {ids.min()} to {ids.max()}")
