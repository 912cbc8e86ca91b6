"""All prompts of a run, looked at before it begins: in how many chunks they are encoded, and what of them is cut."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from ether_diffusion.families.cut_prompts import cut_remarks
from ether_diffusion.families.protocol import Family
from ether_diffusion.training.program import Config, Start

logger = logging.getLogger(__name__)


def settle_prompts(start: Start[Config], prompts: Iterable[str]) -> Config:
    """Settle one number of chunks for the whole run, and warn of what an encoder does not see.

    With prompt_chunks=auto it is what the longest prompt needs. All prompts of the run have that many, the empty one
    of guidance among them, so that the encoding of one never depends on those beside it.

    Args:
        start: its settings and its family are changed.
        prompts: of training, of the class, and of the samples.

    Returns:
        The settings with the number.
    """
    every = list(dict.fromkeys(prompts))
    if start.config.prompt_chunks == "auto":
        start.config = replace(start.config, prompt_chunks=start.family.chunks_needed(every))
        start.family.settings = start.config.family_settings
    if start.accelerator.is_main_process:
        for remark in cut_remarks(start.family, every):
            logger.warning("%s%s", remark, _remedy(start.family))
        if (chunks := start.family.settings.prompt_chunks) > 1:
            logger.info("every prompt is encoded in %d chunks", chunks)
    return start.config


def _remedy(family: Family) -> str:
    """What helps, where a setting does."""
    if "prompt_chunks" in family.OPTIONS:
        return "; --prompt_chunks auto encodes all of every prompt"
    return "; encoders that are not CLIP see more with a larger --max_sequence_length" * (
        "max_sequence_length" in family.OPTIONS
    )
