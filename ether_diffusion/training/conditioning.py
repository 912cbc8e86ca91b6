"""What the UNet is told beside the noisy latents: prompts as embeddings, and what a control adds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from ether_diffusion.data.cache import TensorCache, module_hash
from ether_diffusion.pipelines.components import is_xl, text_encoders


class Conditioning(Protocol):
    """A control, in training and in drawing."""

    def training(self, inputs: UNetInputs, conditions: Tensor) -> AbstractContextManager[dict[str, Any]]:
        """Within the context the UNet is controlled; it gives more arguments for the UNet's forward.

        Args:
            inputs: what the UNet is given.
            conditions: (batch, 3, H, W) in [0, 1].
        """

    def drawing(self, pipe: DiffusionPipeline, conditions: list[Image.Image]) -> AbstractContextManager[dict[str, Any]]:
        """Within the context the pipeline draws under ``conditions``, one for each picture; more arguments for it."""


@dataclass(frozen=True)
class UNetInputs:
    """The arguments of a UNet's forward.

    Attributes:
        sample: noisy latents (batch, channels, h, w).
        timesteps: (batch,).
        prompt_embeds: (batch, tokens, features).
        added: SDXL's pooled embeddings and time ids, None for others.
    """

    sample: Tensor
    timesteps: Tensor
    prompt_embeds: Tensor
    added: dict[str, Tensor] | None


def encode_prompts(pipe: DiffusionPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Encode prompts as the pipeline itself does at inference, with gradients where they are enabled.

    Returns:
        prompt_embeds (batch, tokens, features), and for SDXL pooled_prompt_embeds (batch, features).
    """
    device = pipe.unet.device
    if is_xl(pipe):
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if getattr(pipe.config, "force_zeros_for_empty_prompt", False):  # what guidance leads away from
            said = torch.tensor([bool(prompt) for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds * said[:, None, None], pooled * said[:, None]
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    embeds, _ = pipe.encode_prompt(list(prompts), device, 1, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds}


@torch.no_grad()
def encode_prompts_once(
    pipe: DiffusionPipeline, prompts: Sequence[str], cache: TensorCache
) -> dict[str, dict[str, Tensor]]:
    """Encode every distinct prompt with the frozen text encoders, through the cache.

    Returns:
        For every prompt what :func:`encode_prompts` gives, without the batch dimension, on the CPU.
    """
    tokenizers = [getattr(pipe, name) for name in ("tokenizer", "tokenizer_2") if getattr(pipe, name, None) is not None]
    dependencies = {
        "kind": "prompt",
        "encoders": {name: module_hash(module) for name, module in text_encoders(pipe).items()},
        "device": pipe.unet.device.type,
        "versions": [torch.__version__, transformers.__version__, diffusers.__version__],
    }

    def tokens(prompt: str) -> list[list[int]]:
        return [
            t(prompt, padding="max_length", max_length=t.model_max_length, truncation=True).input_ids
            for t in tokenizers
        ]

    def encode(prompt: str) -> dict[str, Tensor]:
        return {key: value[0].cpu().contiguous() for key, value in encode_prompts(pipe, [prompt]).items()}

    return {
        prompt: cache.get_or_compute({**dependencies, "tokens": tokens(prompt)}, partial(encode, prompt))
        for prompt in dict.fromkeys(prompts)
    }
