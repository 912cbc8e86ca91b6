"""A folder of pictures of one subject (or of its class), with a prompt for each."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import PIL
import torch
from PIL import Image

from ether_diffusion.data.augment import Augmentation, augment, check_cover, cover, cover_size, is_deterministic
from ether_diffusion.data.buckets import bucket_sizes, check_resolution, nearest_bucket
from ether_diffusion.data.captions import Picture, Prompts, list_pictures, prompts_of
from ether_diffusion.data.options import DEFAULTS, FolderOptions
from ether_diffusion.images import load_image

_PREPROCESSING_VERSION = 1  # raise it when load_image or augment change the pixels they make

SHOWN_ENLARGED = 4
"""So many enlarged pictures are named, the most enlarged first."""


@dataclass(frozen=True)
class Example:
    """One augmented picture with its prompt.

    Args:
        pixel_values: float32 ``(3, height, width)`` in [-1, 1], of ``target_size``.
        prompt: the picture's first caption, else the folder's prompt.
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
    """The pictures of a folder, augmented afresh each time one is asked for.

    Args:
        folder: holds the pictures; each line of ``NAME.txt`` or ``NAME.jpg.txt`` beside ``NAME.jpg`` is a caption of
            that picture, and so is what ``metadata.csv`` or ``metadata.jsonl`` says of it.
        prompt: the prompt of every picture without a caption.
        resolution: side of the square that pictures are cut to, in pixels.
        augmentation: how they are cut.
        use_buckets: cut each to the nearest of a few aspect ratios instead, of about the square's area.
        divisible_by: every side is a multiple of it: the VAE's factor.
        limit: use only the first so many pictures.
        options: where pictures and captions are looked for, and how captions become prompts.

    Attributes:
        pictures: with their own captions, sorted by name.
        listing: the metadata, if there are any.
        skipped: the files that are no pictures that can be read.
        prompts_of: what each picture may be called.
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
        options: FolderOptions = DEFAULTS,
    ) -> None:
        check_resolution(resolution, divisible_by)
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}, expected at least 1 picture; leave it out to use all of {folder}")
        self.augmentation = augmentation
        found = list_pictures(folder, options)
        self.folder, self.prompt, self.listing, self.options = Path(folder), prompt, found.listing, options
        self.skipped: list[Path] = found.skipped
        self.pictures: list[Picture] = found.pictures[:limit]
        self.prompts_of: list[Prompts] = [prompts_of(picture, prompt, options) for picture in self.pictures]
        self.use_buckets = use_buckets
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
        return len(self.pictures)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [picture.path for picture in self.pictures]

    @property
    def prompts(self) -> list[str]:
        """The first prompt of each picture."""
        return [prompts.first for prompts in self.prompts_of]

    def example(self, index: int, generator: torch.Generator) -> Example:
        """Augment picture ``index`` with draws from ``generator``; it is read once and kept at its resized size.

        Raises:
            UnreadableImageError: the file has been broken since the folder was listed.
            OSError: the file has gone since the folder was listed.
        """
        size = self.sizes[index]
        if index not in self._resized:
            self._resized[index] = cover(load_image(self.pictures[index].path), size)
        augmented = augment(self._resized[index], size, self.augmentation, generator)
        return Example(
            pixel_values=augmented.pixel_values,
            prompt=self.prompts_of[index].first,
            original_size=self._original_sizes[index],
            crop_top_left=augmented.crop_top_left,
            target_size=size,
        )

    def remarks(self) -> list[str]:
        """What a user should know of the folder: captions that are missing or many, settings without an effect on it,
        pictures that are enlarged.
        """
        among = f"of {len(self)} pictures in {self.folder}"
        without = sum(not picture.captions for picture in self.pictures) if self.listing else 0
        several = sum(len(picture.captions) > 1 for picture in self.pictures)
        found = []
        if without:
            found.append(f'{without} {among} have no caption in {self.listing} or beside them, and get "{self.prompt}"')
        if several:
            found.append(f"{several} {among} have several captions: each sample takes one of them")
        if self._has_idle_prefix:
            found.append(f"caption_prefix stands before captions only, of which {self.folder} has none")
        if self._has_idle_shuffle:
            found.append(
                f"shuffle_tags changes nothing: no caption in {self.folder} has two comma-separated tags that may "
                "change places"
            )
        return found + self._enlarged(among)

    @property
    def _has_idle_prefix(self) -> bool:
        return bool(self.options.caption_prefix) and not any(picture.captions for picture in self.pictures)

    @property
    def _has_idle_shuffle(self) -> bool:
        plain = replace(self.options, shuffle_tags=False)
        as_written = [prompts_of(each, self.prompt, plain) for each in self.pictures]
        return self.options.shuffle_tags and self.prompts_of == as_written

    @property
    def _factors(self) -> list[float]:
        """By how much each picture is resized to cover its size."""
        return [cover_size(own, size)[0] / own[0] for own, size in zip(self._original_sizes, self.sizes, strict=True)]

    @property
    def enlarged(self) -> list[int]:
        """The indices of the pictures that are smaller than their size, the most enlarged first."""
        factors = self._factors
        return sorted((i for i in range(len(self)) if factors[i] > 1), key=lambda index: -factors[index])

    def _enlarged(self, among: str) -> list[str]:
        """A remark on the pictures that are enlarged to cover their sizes, the most enlarged first."""
        factors, indices = self._factors, self.enlarged
        if not indices:
            return []
        named = []
        for index in indices[:SHOWN_ENLARGED]:
            height, width = self._original_sizes[index]
            named.append(f"{self.pictures[index].name} ({width} x {height}) to {factors[index]:.2f} of its size")
        more = ", …" if len(indices) > SHOWN_ENLARGED else ""
        return [
            f"{len(indices)} {among} are smaller than the resolution and are enlarged, which blurs them: "
            f"{', '.join(named)}{more}; use larger pictures, or a smaller --resolution"
        ]

    def fingerprint(self, index: int) -> dict[str, str | int]:
        """Return all that picture ``index`` depends on where ``deterministic``, as part of a cache key."""
        height, width = self.sizes[index]
        return {
            "file_sha256": hashlib.sha256(self.pictures[index].path.read_bytes()).hexdigest(),
            "height": height,
            "width": width,
            **asdict(self.augmentation),
            "pillow": PIL.__version__,
            "preprocessing": _PREPROCESSING_VERSION,
        }
