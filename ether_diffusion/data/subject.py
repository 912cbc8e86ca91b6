"""A folder of pictures of one subject (or of its class), with a prompt for each."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import PIL
import torch
from PIL import Image

from ether_diffusion.data.augment import Augmentation, augment, check_cover, cover, is_deterministic
from ether_diffusion.data.buckets import bucket_sizes, check_resolution, nearest_bucket
from ether_diffusion.images import list_images, load_caption, load_image

_PREPROCESSING_VERSION = 1  # raise it when load_image or augment change the pixels they make


@dataclass(frozen=True)
class Example:
    """One augmented picture with its prompt.

    Args:
        pixel_values: float32 ``(3, height, width)`` in [-1, 1], of ``target_size``.
        prompt: the picture's caption, else the folder's prompt.
        original_size: ``(height, width)`` of the picture before it was resized.
        crop_top_left: ``(top, left)`` of the crop in the resized picture, in pixels.
        target_size: ``(height, width)`` of ``pixel_values``.
        condition: float32 ``(3, height, width)`` in [0, 1], cut as the picture is, where it is trained with one.
    """

    pixel_values: torch.Tensor
    prompt: str
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]
    condition: torch.Tensor | None = None


class SubjectFolder:
    """The pictures directly in a folder, augmented afresh each time one is asked for.

    Args:
        folder: holds the pictures; ``NAME.txt`` or ``NAME.jpg.txt`` beside ``NAME.jpg`` is that picture's prompt.
        prompt: the prompt of every picture without a caption.
        resolution: side of the square that pictures are cut to, in pixels.
        augmentation: how they are cut.
        use_buckets: cut each to the nearest of a few aspect ratios instead, of about the square's area.
        divisible_by: every side is a multiple of it: the VAE's factor.
        limit: use only the first so many pictures.

    Attributes:
        paths: the pictures, sorted by name.
        prompts: the prompt of each.
        sizes: the target ``(height, width)`` of each.
        deterministic: whether no picture is augmented by chance, so that all latents may be cached.

    Raises:
        ValueError: ``resolution`` is no multiple of ``divisible_by``, ``limit`` is not positive, the folder
            has no readable picture or one of extreme shape, or a caption is not UTF-8.
        FileNotFoundError: the folder does not exist.
        NotADirectoryError: the folder is a file.
    """

    def __init__(
        self,
        folder: str | Path,
        prompt: str,
        resolution: int,
        augmentation: Augmentation,
        use_buckets: bool = False,
        divisible_by: int = 8,
        limit: int | None = None,
    ) -> None:
        check_resolution(resolution, divisible_by)
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}, expected at least 1 picture; leave it out to use all of {folder}")
        self.augmentation = augmentation
        self.paths: list[Path] = list_images(folder)[:limit]
        self.prompts: list[str] = [load_caption(path) or prompt for path in self.paths]
        buckets = bucket_sizes(resolution, divisible_by) if use_buckets else [(resolution, resolution)]
        image_sizes = [(image.height, image.width) for image in map(load_image, self.paths)]
        self._original_sizes = image_sizes
        self._resized: dict[int, Image.Image] = {}
        self.sizes: list[tuple[int, int]] = [nearest_bucket(image_size, buckets) for image_size in image_sizes]
        for path, image_size, size in zip(self.paths, image_sizes, self.sizes, strict=True):
            check_cover(image_size, size, str(path))
        self.deterministic: bool = all(
            is_deterministic(image_size, size, augmentation)
            for image_size, size in zip(image_sizes, self.sizes, strict=True)
        )

    def __len__(self) -> int:
        return len(self.paths)

    def example(self, index: int, generator: torch.Generator) -> Example:
        """Augment picture ``index`` with draws from ``generator``; it is read once and kept at its resized size.

        Raises:
            UnreadableImageError: the file has been broken since the folder was listed.
            OSError: the file has gone since the folder was listed.
        """
        size = self.sizes[index]
        if index not in self._resized:
            self._resized[index] = cover(load_image(self.paths[index]), size)
        augmented = augment(self._resized[index], size, self.augmentation, generator)
        return Example(
            pixel_values=augmented.pixel_values,
            prompt=self.prompts[index],
            original_size=self._original_sizes[index],
            crop_top_left=augmented.crop_top_left,
            target_size=size,
        )

    def fingerprint(self, index: int) -> dict[str, str | int]:
        """Return all that picture ``index`` depends on where ``deterministic``, as part of a cache key."""
        height, width = self.sizes[index]
        return {
            "file_sha256": hashlib.sha256(self.paths[index].read_bytes()).hexdigest(),
            "height": height,
            "width": width,
            **asdict(self.augmentation),
            "pillow": PIL.__version__,
            "preprocessing": _PREPROCESSING_VERSION,
        }
