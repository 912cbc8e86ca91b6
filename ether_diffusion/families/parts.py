"""The parts of any pipeline by their roles, whether a family claims it or not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from torch import nn

DENOISERS = ("unet", "transformer")
"""Components that denoise, under diffusers' names."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
"""Components that encode prompts, likewise."""


def parts_without(index: Mapping[str, Any]) -> dict[str, None]:
    """Parts that a pipeline was saved without, by its ``model_index.json``: diffusers wants to be told so again."""
    return {name: None for name, entry in index.items() if entry == [None, None]}


def left_out(index: Mapping[str, Any], unused: Sequence[str]) -> dict[str, Any]:
    """What a pipeline's loading is told to leave out: parts that are not used, such as safety checkers, or not there.

    Args:
        index: its ``model_index.json``.
        unused: names of parts.
    """
    absent: dict[str, Any] = {name: None for name in unused if name in index} | parts_without(index)
    return {**absent, "requires_safety_checker": False} if "safety_checker" in absent else absent


def words_of_name(pipe: DiffusionPipeline) -> set[str]:
    """The words in small letters of the folder's or repository's own name that a pipeline was loaded from."""
    name = str(pipe.config.get("_name_or_path") or "")
    return set(re.findall("[a-z0-9]+", PurePath(name).name.lower()))


def denoiser_name(pipe: DiffusionPipeline) -> str | None:
    """The component that denoises, None where the pipeline has none of that name."""
    return next((name for name in DENOISERS if getattr(pipe, name, None) is not None), None)


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """The module that denoises.

    Raises:
        ValueError: the pipeline has none.
    """
    name = denoiser_name(pipe)
    if name is None:
        raise ValueError(f"{type(pipe).__name__} has no {' or '.join(DENOISERS)}: it is no diffusion pipeline")
    module: nn.Module = getattr(pipe, name)
    return module


def statistics_misfit(vae: ModelMixin) -> str | None:
    """Why latents of an autoencoder are not scaled by one number alone; None where they are."""
    config = vae.config
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        return "its latents are shifted and scaled by latents_mean and latents_std of its autoencoder"
    if config.get("shift_factor"):
        return f"its latents are shifted by shift_factor={config['shift_factor']} of its autoencoder"
    return None


def channels_misfit(denoiser: ModelMixin, *channels: int) -> str | None:
    """Why a denoiser takes more than noisy latents, which have one of those ``channels``; None where it does not."""
    taken = denoiser.config.in_channels
    if taken in channels:
        return None
    return (
        f"its denoiser takes {taken} channels, and latents have {' or '.join(map(str, channels))}: "
        "it is a variant for editing, inpainting or control"
    )
