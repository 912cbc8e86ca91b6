"""Drawing with a control: ``prompt`` and ``control_image`` in, pictures out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ether_diffusion.control.conditions import MAP_PALETTE, load_condition, map_picture
from ether_diffusion.control.expected import misfit
from ether_diffusion.families.registry import control_place
from ether_diffusion.pipelines.loaded import control_in
from ether_diffusion.private import execution_device

logger = logging.getLogger(__name__)

PALETTE_GREYS = {red for red, green, blue in MAP_PALETTE if red == green == blue}
"""A coloured map may be of these alone; as class ids they are rare."""

ControlImage = Image.Image | str | Path | Tensor | Sequence[Image.Image | str | Path]
"""One image for all pictures or one for each prompt: files, PIL images, or a tensor (N, 3, H, W) in [0, 1]."""


@contextmanager
def controlled(
    pipe: DiffusionPipeline,
    control_image: ControlImage,
    strength: float = 1.0,
    name: str | None = None,
    num_images_per_prompt: int = 1,
) -> Iterator[None]:
    """Within the context the pipeline draws under a control that :func:`ether_diffusion.load` has loaded.

    It works with every pipeline over the UNet, text to image, img2img, inpainting: the control is added inside of the
    UNet. Both branches of guidance see it, as in training. Contexts for several controls may be nested.

    Args:
        pipe: the pipeline.
        control_image: one for all pictures or one for each prompt, of the size of the pictures.
        strength: factor of the control; 1 is what was trained, 0 is without.
        name: which control; may be left out where there is only one.
        num_images_per_prompt: as it is given to the pipeline, where there are several control images.

    Raises:
        ValueError: no control is loaded, there are several and no name, or the sizes do not fit (at the first step).
    """
    control = control_in(pipe)
    if control is None:
        raise ValueError("no control is loaded in this pipeline: ether.load(pipe, folder) a run of train_controlnet.py")
    if name is None and len(control.encoders) > 1:
        raise ValueError(f"name the control that the image is for, one of: {', '.join(control.encoders)}")
    chosen = next(iter(control.encoders)) if name is None else name
    encoder = control.encoders.get(chosen)
    maps = encoder is not None and encoder.config.condition == "map"
    _, factor = control_place(pipe)
    condition = control_tensor(control_image, factor, maps)
    if encoder is not None and (problem := misfit(condition, encoder.config)):
        logger.warning("%s", problem)
    condition = condition.to(execution_device(pipe))
    with torch.no_grad():
        features = strength * control.features(chosen, condition)
    if len(features) > 1:
        features = features.repeat_interleave(num_images_per_prompt, 0)
    with control.given({chosen: features}):
        yield


def control_tensor(
    control_image: ControlImage,
    vae_factor: int,
    maps: bool = False,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """Control images as the encoder takes them, (N, 3, H, W) fp32 in [0, 1]; resized where a size is given.

    Args:
        control_image: the images.
        vae_factor: sides are cut down to multiples of it.
        maps: whether they are semantic maps: grey ones hold class ids and are coloured as in training, and nothing is
            interpolated.
        height: in pixels.
        width: likewise.

    Raises:
        TypeError: an image is an array, or something else that is none.
    """
    resample = "nearest" if maps else "lanczos"
    processor = VaeImageProcessor(vae_factor, resample=resample, do_normalize=False, do_convert_rgb=True)
    images: Any = control_image
    if isinstance(images, np.ndarray):
        images = [images]  # which is refused by name
    if not isinstance(images, Tensor):
        listed = [images] if isinstance(images, Image.Image | str | Path) else list(images)
        images = [_seen(each, maps) for each in listed]
    tensor: Tensor = processor.preprocess(images, height=height, width=width)
    return tensor.float()


def _seen(image: Image.Image | str | Path, maps: bool) -> Image.Image:
    """One control image as training saw conditions, RGB."""
    if not isinstance(image, Image.Image | str | Path):
        raise TypeError(
            f"a control image is a file, a PIL image or a tensor (N, 3, H, W) in [0, 1], not a {type(image).__name__}; "
            "of an array (H, W, 3) of 8 bits make one with PIL.Image.fromarray"
        )
    if not isinstance(image, Image.Image):
        return load_condition(image, maps)
    if maps and image.mode == "RGB" and _greys(image) - PALETTE_GREYS:
        logger.warning(
            "the control was trained on maps in colours, this image is grey: if it holds class ids, give its file, "
            "which diffusers' load_image turns to RGB"
        )
    return map_picture(image) if maps else image.convert("RGB")


def _greys(image: Image.Image) -> set[int]:
    """The values of an RGB image without colours, none of one with colours."""
    values = np.asarray(image)
    return set(np.unique(values[..., 0]).tolist()) if (np.ptp(values, -1) == 0).all() else set()


class StableDiffusionControlPipeline(StableDiffusionPipeline):
    """Stable Diffusion that takes a ``control_image`` beside the prompt.

    pipe = StableDiffusionControlPipeline.from_pretrained(base)
    ether.load(pipe, "runs/maps")
    image = pipe("a red house on a beach", control_image).images[0]
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        control_image: ControlImage | None = None,
        *,
        control_strength: float = 1.0,
        control_name: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        **settings: Any,
    ) -> Any:
        """Draw pictures under a control.

        Args:
            prompt: one prompt or several.
            control_image: one for all pictures or one for each prompt; resized to ``height`` and ``width``, where
                they are given, else the pictures have its size.
            control_strength: factor of the control.
            control_name: which control; may be left out where there is only one.
            height: of the pictures in pixels.
            width: likewise.
            num_images_per_prompt: pictures for each prompt.
            settings: all other arguments of ``StableDiffusionPipeline.__call__``.

        Raises:
            ValueError: there is no control image, no control is loaded, or they do not fit.
        """
        if control_image is None:
            raise ValueError("control_image is missing: give the condition, or draw with a StableDiffusionPipeline")
        condition = control_tensor(control_image, self.vae_scale_factor, self._takes_maps(control_name), height, width)
        embeds = settings.get("prompt_embeds")
        prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
        if len(condition) not in (1, prompts):
            raise ValueError(
                f"{len(condition)} control images for {prompts} prompts: give one for all, or one for each"
            )
        height, width = condition.shape[-2:]
        with controlled(self, condition, control_strength, control_name, num_images_per_prompt):
            return super().__call__(
                prompt, height=height, width=width, num_images_per_prompt=num_images_per_prompt, **settings
            )

    def _takes_maps(self, name: str | None) -> bool:
        control = control_in(self)
        encoders = control.encoders if control else {}
        return any(each.config.condition == "map" for key, each in encoders.items() if name in (None, key))
