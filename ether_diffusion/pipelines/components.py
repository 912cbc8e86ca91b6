"""What a pipeline of Stable Diffusion is made of."""

from __future__ import annotations

from diffusers import DiffusionPipeline
from torch import nn


def is_xl(pipe: DiffusionPipeline) -> bool:
    """Whether the base is SDXL: two text encoders, time ids."""
    return getattr(pipe, "text_encoder_2", None) is not None or getattr(pipe, "tokenizer_2", None) is not None


def text_encoders(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The text encoders of the base by component name."""
    names = ("text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def native_resolution(pipe: DiffusionPipeline) -> int:
    """Side in pixels of the images that the base was made for."""
    return int(pipe.unet.config.sample_size) * vae_factor(pipe)


def vae_factor(pipe: DiffusionPipeline) -> int:
    """Pixels per latent."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)
