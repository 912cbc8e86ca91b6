"""Lumina-Image 2.0: Gemma as text encoder with a system prompt, and a time that runs the other way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ether_diffusion.families.flow import Size
from ether_diffusion.families.lora_names import modelspec
from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.transformer import WITH_MASKS, FlowTransformer


class Lumina2(FlowTransformer):
    """Lumina-Image 2.0 (arXiv 2503.21758)."""

    NAME = "lumina2"
    TITLE = "Lumina-Image 2.0"
    TIME = "1 - σ"
    PIPELINES = ("Lumina2Pipeline",)
    ENCODED = WITH_MASKS
    STEPS = 30
    GUIDANCE = 4.0
    LENGTH = 256
    LORA_METADATA = modelspec("lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0", "lumina2")

    def tokens_of(self, size: Size) -> int:
        """The pipeline counts the channels of the latents for tokens, so that the shift is the same for all sizes."""
        return self.latent_channels

    def said(self, prompt: str) -> str:
        """The pipeline's system prompt before it."""
        return f"{self.pipe.system_prompt} <Prompt Start> {prompt}"

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, features) and their mask (batch, tokens), 1 where the prompt is."""
        embeds, mask, *_ = self.encode_text(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        return self.zeros_with_mask(batch, self.length, self.denoiser.config.cap_feat_dim)

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Latents as they are; the time is 1 - σ."""
        return {
            "hidden_states": noisy,
            "timestep": 1 - times,
            "encoder_hidden_states": prompts["prompt_embeds"],
            "encoder_attention_mask": prompts["prompt_attention_mask"],
            "return_dict": False,
        }

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The velocity is the answer's negative."""
        answer: Tensor = output[0]
        return -answer
