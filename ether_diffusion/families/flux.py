"""FLUX.1 dev and schnell: a CLIP and a T5 text encoder, latents packed to tokens, guidance as an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ether_diffusion.families.lora_names import CLIP, T5, TRANSFORMER, formats, modelspec
from ether_diffusion.families.original import FLUX
from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.transformer import PATCH, FlowTransformer, places, to_tokens


class Flux(FlowTransformer):
    """FLUX.1 (Black Forest Labs 2024)."""

    NAME = "flux"
    TITLE = "FLUX.1"
    PIPELINES = ("FluxPipeline",)
    TEXT_ENCODERS: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    OPTIONS = FlowTransformer.OPTIONS | {"guidance_scale_training"}
    TOKEN_KEYS: ClassVar[Mapping[str, str]] = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}
    UNUSED = ("image_encoder", "feature_extractor")
    GUIDANCE = 3.5
    LENGTH = 512
    CONTROL_PLACE = "x_embedder"
    LORA_FORMATS = formats({**TRANSFORMER, **CLIP}, {**TRANSFORMER, **CLIP, "text_encoder_2": T5}, True)
    ORIGINAL = FLUX
    LORA_METADATA = modelspec("flux-1-dev", "https://github.com/black-forest-labs/flux", "flux1")

    @property
    def lora_metadata(self) -> dict[str, str]:
        """Schnell takes no guidance."""
        dev = super().lora_metadata
        return dev if self.denoiser.config.guidance_embeds else {**dev, "modelspec.architecture": "flux-1-schnell/lora"}

    @property
    def distilled(self) -> str | None:
        """FLUX.1 schnell is the one that takes no guidance."""
        if self.denoiser.config.guidance_embeds:
            return None
        return "without guidance as an input this is FLUX.1 schnell, or another distilled base"

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, features) and pooled_prompt_embeds (batch, features)."""
        embeds, pooled, _ = self.encode_text(prompts, prompt_2=None)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_for_drawing(self, prompts: Sequence[str]) -> dict[str, Any]:
        """prompt_embeds and pooled_prompt_embeds: guidance is an input here."""
        return dict(self.encode_prompts(prompts))

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        config = self.denoiser.config
        return {
            "prompt_embeds": self.zeros(batch, self.length, config.joint_attention_dim),
            "pooled_prompt_embeds": self.zeros(batch, config.pooled_projection_dim),
        }

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Tokens with their places; the time is σ."""
        embeds, (height, width) = prompts["prompt_embeds"], noisy.shape[-2:]
        return {
            "hidden_states": to_tokens(noisy),
            "timestep": (1000 * times).to(noisy.dtype) / 1000,
            "guidance": self.guidance(noisy),
            "pooled_projections": prompts["pooled_prompt_embeds"],
            "encoder_hidden_states": embeds,
            "txt_ids": torch.zeros(embeds.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            "img_ids": places(height // PATCH, width // PATCH).to(noisy.device, noisy.dtype),
            "joint_attention_kwargs": {},
            "return_dict": False,
        }

    def unscaled(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """z from packed latents."""
        return super().unscaled(self.unpacked(drawn, height, width), height, width)
