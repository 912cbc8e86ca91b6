"""What the denoiser is told beside the noisy latents: prompts as embeddings, and what a control adds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from ether_diffusion.data.cache import JSON, TensorCache, module_hash
from ether_diffusion.families.protocol import Family

logger = logging.getLogger(__name__)


class Conditioning(Protocol):
    """A control, in training and in drawing."""

    def training(self, arguments: dict[str, Any], conditions: Tensor) -> AbstractContextManager[dict[str, Any]]:
        """Within the context the denoiser is controlled; it gives more arguments for the denoiser's forward.

        Args:
            arguments: what the denoiser is given.
            conditions: (batch, 3, H, W) in [0, 1].
        """

    def drawing(self, pipe: DiffusionPipeline, conditions: list[Image.Image]) -> AbstractContextManager[dict[str, Any]]:
        """Within the context the pipeline draws under ``conditions``, one for each picture; more arguments for it."""


@torch.no_grad()
def encode_prompts_once(family: Family, prompts: Sequence[str], cache: TensorCache) -> dict[str, dict[str, Tensor]]:
    """Encode every distinct prompt with the frozen text encoders, through the cache.

    Returns:
        For every prompt what :meth:`~ether_diffusion.families.protocol.Family.encode_prompt` gives, on the CPU.
    """
    dependencies: dict[str, JSON] = {
        "kind": "prompt",
        "encoders": {name: module_hash(module) for name, module in family.text_encoders.items()},
        "device": family.text_device.type,
        "versions": [torch.__version__, transformers.__version__, diffusers.__version__],
    }

    warn_of_cut(family, prompts)

    def encode(prompt: str) -> dict[str, Tensor]:
        return {key: value.cpu() for key, value in family.encode_prompt(prompt).items()}

    return {
        prompt: cache.get_or_compute({**dependencies, **family.prompt_key(prompt)}, partial(encode, prompt))
        for prompt in dict.fromkeys(prompts)
    }


def warn_of_cut(family: Family, prompts: Sequence[str]) -> None:
    """Log what encoders do not see of long prompts."""
    for prompt in dict.fromkeys(prompts):
        for encoder, rest in family.cut(prompt).items():
            logger.warning('%s sees only the beginning of the prompt "%s"; cut off is: "%s"', encoder, prompt, rest)
