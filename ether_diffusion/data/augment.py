"""From a picture to the tensor that the VAE sees: resize, crop, flip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from ether_diffusion.images import PIXEL_LIMIT


@dataclass(frozen=True)
class Augmentation:
    """How a picture is cut to size.

    Args:
        center_crop: cut the middle rather than a random place.
        random_flip: mirror every second picture, by chance.
    """

    center_crop: bool = False
    random_flip: bool = False


@dataclass(frozen=True)
class AugmentedImage:
    """A picture cut to size, with the micro-conditions of SDXL (Podell et al. 2023, section 2.2).

    Args:
        pixel_values: float32 ``(3, height, width)`` in [-1, 1].
        original_size: ``(height, width)`` of the picture before it was resized.
        crop_top_left: ``(top, left)`` of the crop, in pixels of the resized picture; where it is flipped, of
            the mirrored resized picture, which is the one it shows.
        flipped: whether the crop is mirrored.
    """

    pixel_values: torch.Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    flipped: bool


def cover_size(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest ``(height, width)`` with the picture's aspect ratio that covers ``size``."""
    (image_height, image_width), (height, width) = image_size, size
    if height * image_width >= width * image_height:  # the height decides
        return height, max(width, round(image_width * height / image_height))
    return max(height, round(image_height * width / image_width)), width


def cover(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Resize ``image`` to :func:`cover_size`; one of that size is returned as it is.

    Raises:
        ValueError: the result would have too many pixels, see :func:`check_cover`.
    """
    check_cover((image.height, image.width), size)
    height, width = cover_size((image.height, image.width), size)
    if (image.height, image.width) == (height, width):
        return image
    return image.resize((width, height), resample)


def check_cover(image_size: tuple[int, int], size: tuple[int, int], name: str = "a picture") -> None:
    """Refuse a picture of ``image_size`` ``(height, width)`` that is so long that covering ``size`` takes gigabytes.

    Raises:
        ValueError: the resized picture would have more than :data:`~ether_diffusion.images.PIXEL_LIMIT` pixels.
    """
    height, width = cover_size(image_size, size)
    if height * width > PIXEL_LIMIT:
        raise ValueError(
            f"{name} of {image_size[1]} x {image_size[0]} pixels would have {width} x {height} once it covers "
            f"{size[1]} x {size[0]}; at most {PIXEL_LIMIT:,} pixels are made: cut the picture"
        )


def is_deterministic(image_size: tuple[int, int], size: tuple[int, int], settings: Augmentation) -> bool:
    """Say whether every augmentation of the picture is the same, so that its latents may be cached."""
    return not settings.random_flip and (settings.center_crop or cover_size(image_size, size) == size)


@dataclass(frozen=True)
class Crop:
    """What is cut out of a resized picture, and whether it is mirrored; the same for a picture and its condition.

    Attributes:
        size: ``(height, width)`` of the result.
        top_left: ``(top, left)`` in the resized picture.
        flipped: whether the crop is mirrored.
    """

    size: tuple[int, int]
    top_left: tuple[int, int]
    flipped: bool

    def apply(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
        """Resize ``image`` to cover ``size`` and cut the crop out of it."""
        (top, left), (height, width) = self.top_left, self.size
        cut = cover(image, self.size, resample).crop((left, top, left + width, top + height))
        return ImageOps.mirror(cut) if self.flipped else cut


def draw_crop(
    image_size: tuple[int, int], size: tuple[int, int], settings: Augmentation, generator: torch.Generator
) -> Crop:
    """Draw the crop of a picture of ``image_size`` ``(height, width)`` to ``size``.

    Three numbers are drawn from ``generator`` whatever the settings, so later draws do not depend on them.
    """
    resized_height, resized_width = cover_size(image_size, size)
    spare_height, spare_width = resized_height - size[0], resized_width - size[1]
    u_top, u_left, u_flip = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    if settings.center_crop:
        top, left = spare_height // 2, spare_width // 2
    else:
        top, left = int(u_top * (spare_height + 1)), int(u_left * (spare_width + 1))
    return Crop(size, (top, left), settings.random_flip and u_flip < 0.5)


def augment(
    image: Image.Image, size: tuple[int, int], settings: Augmentation, generator: torch.Generator
) -> AugmentedImage:
    """Resize an RGB ``image`` to cover ``size`` ``(height, width)``, crop it to ``size``, and flip it.

    Raises:
        ValueError: ``image`` is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"got a picture of mode {image.mode}, expected RGB; open it with load_image")
    original_size = (image.height, image.width)
    crop = draw_crop(original_size, size, settings, generator)
    top, left = crop.top_left
    if crop.flipped:
        left = cover_size(original_size, size)[1] - size[1] - left
    return AugmentedImage(pixel_values(crop.apply(image)), original_size, (top, left), crop.flipped)


def unit_values(image: Image.Image) -> torch.Tensor:
    """An RGB picture as float32 ``(3, height, width)`` in [0, 1], as conditions are seen."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32) / 255


def pixel_values(image: Image.Image) -> torch.Tensor:
    """An RGB picture as float32 ``(3, height, width)`` in [-1, 1], as the autoencoder sees it."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return values.to(torch.float32) / 127.5 - 1.0
