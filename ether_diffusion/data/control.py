"""Pairs of a picture and its condition as training examples: cut and mirrored alike, now and then without a prompt."""

from __future__ import annotations

import torch
from PIL import Image

from ether_diffusion.control.conditions import CANNY_HIGH, CANNY_LOW, canny
from ether_diffusion.data.augment import Augmentation, check_cover, draw_crop, pixel_values, unit_values
from ether_diffusion.data.buckets import check_resolution
from ether_diffusion.data.pairs import Pair, PairSource
from ether_diffusion.data.subject import Example


class ControlPairs:
    """Pairs cut to squares, augmented afresh each time one is asked for.

    Args:
        source: the pairs.
        resolution: side of the squares in pixels.
        augmentation: how they are cut.
        empty_prompts: share of the examples whose prompt is left out, so that guidance has something to lead away
            from.
        thresholds: of canny edges, which are made where a pair has no condition; from the picture as it is cut.
        smooth: whether conditions are resized as pictures are (Lanczos); maps are not (nearest).
        divisible_by: the resolution is a multiple of it: the VAE's factor.

    Raises:
        ValueError: ``resolution`` is no multiple of ``divisible_by``, or the share is none.
    """

    def __init__(
        self,
        source: PairSource,
        resolution: int,
        augmentation: Augmentation,
        empty_prompts: float = 0.0,
        thresholds: tuple[int, int] = (CANNY_LOW, CANNY_HIGH),
        smooth: bool = True,
        divisible_by: int = 8,
    ) -> None:
        check_resolution(resolution, divisible_by)
        if not 0 <= empty_prompts <= 1:
            raise ValueError(f"the share of empty prompts is {empty_prompts}, expected 0 to 1")
        self.source = source
        self.resolution = resolution
        self.augmentation = augmentation
        self.empty_prompts = empty_prompts
        self.thresholds = thresholds
        self.resample = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, generator: torch.Generator) -> Example:
        """Augment pair ``index`` with draws from ``generator``; of several captions one is drawn.

        Raises:
            UnreadableImageError: a file is broken.
            ValueError: a picture is of extreme shape.
            ImportError: canny edges are wanted and OpenCV is not installed.
        """
        pair, size = self.source.pair(index), (self.resolution, self.resolution)
        original_size = (pair.image.height, pair.image.width)
        check_cover(original_size, size, pair.name)
        crop = draw_crop(original_size, size, self.augmentation, generator)
        empty = torch.rand((), generator=generator, dtype=torch.float64).item() < self.empty_prompts
        prompt = pair.prompt
        if len(pair.captions) > 1:
            prompt = pair.captions[int(torch.randint(len(pair.captions), (), generator=generator))]
        image = crop.apply(pair.image)
        condition = self._condition(image) if pair.condition is None else crop.apply(pair.condition, self.resample)
        return Example(
            pixel_values(image),
            "" if empty else prompt,
            original_size,
            crop.top_left,
            size,
            unit_values(condition),
        )

    def shown(self, index: int) -> Pair:
        """Pair ``index`` cut in the middle, with its condition: for sample grids and evaluation."""
        pair, size = self.source.pair(index), (self.resolution, self.resolution)
        crop = draw_crop((pair.image.height, pair.image.width), size, Augmentation(center_crop=True), torch.Generator())
        image = crop.apply(pair.image)
        condition = self._condition(image) if pair.condition is None else crop.apply(pair.condition, self.resample)
        return Pair(image, condition, pair.prompt, pair.captions, pair.name)

    def cut(self, condition: Image.Image) -> Image.Image:
        """A condition without its picture, cut in the middle."""
        size = (self.resolution, self.resolution)
        centre = Augmentation(center_crop=True)
        crop = draw_crop((condition.height, condition.width), size, centre, torch.Generator())
        return crop.apply(condition, self.resample)

    def _condition(self, image: Image.Image) -> Image.Image:
        return canny(image, *self.thresholds)
