"""Stable Diffusion 3 and 3.5: two CLIP text encoders, an optional T5, a joint transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ether_diffusion.families.lora_names import T5, TRANSFORMER, TWO_CLIPS, formats, modelspec
from ether_diffusion.families.original import SD3
from ether_diffusion.families.protocol import CLIP_LENGTH, Prompts
from ether_diffusion.families.transformer import FlowTransformer


class StableDiffusion3(FlowTransformer):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

    NAME = "sd3"
    TITLE = "Stable Diffusion 3 and 3.5"
    TIME = "1000 σ"
    PIPELINES = ("StableDiffusion3Pipeline",)
    ENCODED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    TEXT_ENCODERS: ClassVar[Mapping[str, str]] = {
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
        "text_encoder_3": "tokenizer_3",
    }
    SINGLE_FILE_TEXT: ClassVar[Mapping[str, str]] = {
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    }
    UNUSED = ("image_encoder", "feature_extractor")
    CONTROL_PLACE = "pos_embed.proj"
    GUIDANCE = 7.0
    LENGTH = 256
    MAX_SHIFT = 1.16
    LORA_FORMATS = formats({**TRANSFORMER, **TWO_CLIPS}, {**TRANSFORMER, **TWO_CLIPS, "text_encoder_3": T5}, True)
    ORIGINAL = SD3
    LORA_METADATA = modelspec("stable-diffusion-3-medium", "diffusers", "sd3")

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, features) and pooled_prompt_embeds (batch, features)."""
        embeds, _, pooled, _ = self.encode_text(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_text(self, prompts: Sequence[str], **settings: Any) -> Any:
        """All text encoders are given the same prompts."""
        return super().encode_text(prompts, prompt_2=None, prompt_3=None, **settings)

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        config = self.denoiser.config
        return {
            "prompt_embeds": self.zeros(batch, CLIP_LENGTH + self.length, config.joint_attention_dim),
            "pooled_prompt_embeds": self.zeros(batch, config.pooled_projection_dim),
        }

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Latents as they are; the time is 1000 σ."""
        return {
            "hidden_states": noisy,
            "timestep": 1000 * times,
            "encoder_hidden_states": prompts["prompt_embeds"],
            "pooled_projections": prompts["pooled_prompt_embeds"],
            "return_dict": False,
        }

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The velocity, in the layout of the latents."""
        velocity: Tensor = output[0]
        return velocity
