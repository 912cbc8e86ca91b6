"""Prompts for a pipeline of Stable Diffusion or SDXL, encoded in chunks as in training: the public verb for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ether_diffusion.families.cut_prompts import cut_remarks
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.sd import StableDiffusion
from ether_diffusion.families.sdxl import StableDiffusionXL
from ether_diffusion.families.settings import FamilySettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_prompts(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    negative_prompts: str | Sequence[str] | None = None,
    *,
    chunks: int | None = None,
) -> dict[str, Tensor]:
    """Arguments of a pipeline that stand for prompts of any length: ``pipe(**ether.encode_prompts(pipe, prompt))``.

    A prompt is encoded in chunks of 75 tokens, as training does with ``prompt_chunks`` (docs/data.md). An adapter that
    was trained with a number of chunks should be drawn with that number: its run's ``config.yaml`` and model card say
    it.

    Args:
        pipe: any pipeline of Stable Diffusion 1.x, 2.x or XL, img2img, inpainting and controls among them, with its
            text encoders.
        prompts: one or several.
        negative_prompts: what guidance leads away from, one for all or one for each; the family's own where it is not
            given, which is the empty prompt, or zeros for SDXL.
        chunks: of every prompt, 1 to 64; as many as the longest needs where it is not given. What does not fit is cut
            with a warning.

    Returns:
        ``prompt_embeds`` and ``negative_prompt_embeds``, both (prompts, 77 · chunks, features); of SDXL also
        ``pooled_prompt_embeds`` and ``negative_pooled_prompt_embeds``, (prompts, features).

    Raises:
        UnknownFamilyError: no family claims the pipeline.
        ValueError: its family takes long prompts by itself, there is no prompt, the numbers of prompts differ, or the
            number of chunks is impossible.
    """
    said = [prompts] if isinstance(prompts, str) else list(prompts)
    if not said:
        raise ValueError("there is no prompt: give at least one")
    away = [negative_prompts] * len(said) if isinstance(negative_prompts, str) else negative_prompts
    if away is not None and len(away) != len(said):
        raise ValueError(f"{len(said)} prompts and {len(away)} negative prompts: give one for all, or one for each")
    family = _family(pipe)
    every = [*said, *(away or [])]
    family.settings = FamilySettings(prompt_chunks=family.chunks_needed(every) if chunks is None else chunks)
    for remark in cut_remarks(family, every):
        logger.warning("%s", remark)
    return family.encode_for_drawing(said, away)


def _family(pipe: DiffusionPipeline) -> StableDiffusion:
    """The family around a pipeline; img2img and the like, which no family trains, are known by their names.

    Raises:
        UnknownFamilyError: it is of no family.
        ValueError: it is of a family whose prompts have no chunks.
    """
    kind = type(pipe).__name__
    if hasattr(pipe, "unet") and kind.startswith("StableDiffusionXL"):
        return StableDiffusionXL(pipe)
    if hasattr(pipe, "unet") and kind.startswith("StableDiffusion"):
        return StableDiffusion(pipe)
    able = f"{StableDiffusion.TITLE} and {StableDiffusionXL.TITLE}"
    raise ValueError(
        f"prompts are encoded in chunks for {able}; {family_of(pipe).TITLE} takes long ones by itself: give its "
        "pipeline prompt= and max_sequence_length="
    )
