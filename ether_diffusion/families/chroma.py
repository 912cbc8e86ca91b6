"""Chroma: FLUX.1 with T5 as the only text encoder, a mask of the prompt, and true guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ether_diffusion.families.lora_names import TRANSFORMER, formats, modelspec
from ether_diffusion.families.original import CHROMA
from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.transformer import PATCH, FlowTransformer, places, to_tokens


class Chroma(FlowTransformer):
    """Chroma (Lodestone Rock 2025)."""

    NAME = "chroma"
    TITLE = "Chroma"
    PIPELINES = ("ChromaPipeline",)
    ENCODED = (
        "prompt_embeds",
        None,
        "prompt_attention_mask",
        "negative_prompt_embeds",
        None,
        "negative_prompt_attention_mask",
    )
    TOKEN_KEYS: ClassVar[Mapping[str, str]] = {"text_encoder": ""}
    UNUSED = ("image_encoder", "feature_extractor")
    CHECKPOINTING = "diffusers leaves out the mask of the prompt then"
    STEPS = 35
    GUIDANCE = 5.0
    LENGTH = 512
    LORA_FORMATS = formats(TRANSFORMER, TRANSFORMER, True)
    ORIGINAL = CHROMA
    ORIGINAL_IN_COMFYUI = ("distilled_guidance_layer.",)
    LORA_METADATA = modelspec("chroma", "https://huggingface.co/lodestones/Chroma")

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, features) and a mask (batch, tokens) of the prompt and one more token."""
        embeds, _, mask, *_ = self.encode_text(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        embeds = self.zeros(batch, self.length, self.denoiser.config.joint_attention_dim)
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones_like(embeds[..., 0])}

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Tokens with their places, and a mask of all tokens; the time is σ."""
        embeds, (height, width), tokens = prompts["prompt_embeds"], noisy.shape[-2:], to_tokens(noisy)
        seen = torch.ones(tokens.shape[:2], dtype=torch.bool, device=noisy.device)
        return {
            "hidden_states": tokens,
            "timestep": (1000 * times).to(noisy.dtype) / 1000,
            "encoder_hidden_states": embeds,
            "txt_ids": torch.zeros(embeds.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            "img_ids": places(height // PATCH, width // PATCH).to(noisy.device, noisy.dtype),
            "attention_mask": torch.cat([prompts["prompt_attention_mask"], seen], 1),
            "joint_attention_kwargs": {},
            "return_dict": False,
        }

    def unscaled(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """z from packed latents."""
        return super().unscaled(self.unpacked(drawn, height, width), height, width)
