"""FLUX.2 klein: a language model as text encoder, patches normalised by the autoencoder's batch norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.families.lora_names import TRANSFORMER, formats, modelspec
from ether_diffusion.families.original import FLUX2
from ether_diffusion.families.patch_latents import PatchLatents
from ether_diffusion.families.protocol import Prompts

STEPS = 50
"""Steps of drawing for which the shift is taken: it depends on their number, and this is the pipelines' default."""


WIDTH_OF_4B = 2560
"""Features of the text encoder of klein 4B, Qwen3 with 4 billion parameters."""


class Flux2(PatchLatents):
    """FLUX.2 klein (Black Forest Labs 2025). The pipeline of FLUX.2 dev has not been tried, and is refused."""

    NAME = "flux2"
    TITLE = "FLUX.2 klein"
    PIPELINES = ("Flux2KleinPipeline",)
    STEPS = STEPS
    GUIDANCE = 4.0
    LENGTH = 512
    CONTROL_PLACE = "x_embedder"
    LORA_FORMATS = formats(TRANSFORMER, {**TRANSFORMER, "text_encoder": "text_encoders.qwen3_4b.transformer."}, True)
    READ_BY_DIFFUSERS = ("diffusers", "original")
    ORIGINAL = FLUX2
    ORIGINAL_IN_COMFYUI = ("time_guidance_embed.", "double_stream_modulation", "single_stream_modulation")
    LORA_METADATA = modelspec("Flux.2-klein-4b", "https://github.com/black-forest-labs/flux2")

    @property
    def distilled(self) -> str | None:
        """The 4-step versions of klein say it in their pipeline's settings."""
        return "its pipeline says is_distilled" if self.pipe.config.get("is_distilled") else None

    def lora_stem(self, component: str, path: str, kind: str) -> str | None:
        """ComfyUI calls the text encoder by its size."""
        stem = super().lora_stem(component, path, kind)
        if stem is not None and component == "text_encoder" and self._is_9b:
            return stem.replace("qwen3_4b", "qwen3_8b", 1)
        return stem

    @property
    def lora_metadata(self) -> dict[str, str]:
        """By the size of the text encoder."""
        found = super().lora_metadata
        return found | ({"modelspec.architecture": "Flux.2-klein-9b/lora"} if self._is_9b else {})

    @property
    def _is_9b(self) -> bool:
        """By the width of prompts: three layers of the text encoder side by side."""
        return int(self.denoiser.config.joint_attention_dim) > 3 * WIDTH_OF_4B

    def log_shift(self) -> Callable[[int], float]:
        """The pipelines' fit of the shift to the number of tokens, for 50 steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return lambda tokens: float(compute_empirical_mu(tokens, STEPS))

    def unscaled(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """The pipeline undoes patches and normalisation itself."""
        return drawn.float()

    def said(self, prompt: str) -> str:
        """The beginning of the chat template before it."""
        return self.beginning(prompt, enable_thinking=False)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, features): three layers of the language model side by side."""
        embeds, _ = self.encode_text(prompts)
        return {"prompt_embeds": embeds}

    def encode_for_drawing(self, prompts: Sequence[str]) -> dict[str, Any]:
        """prompt_embeds, and negative_prompt_embeds of the empty prompt."""
        empty = self.encode_prompts([""] * len(prompts))
        return {**self.encode_prompts(prompts), "negative_prompt_embeds": empty["prompt_embeds"]}

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        return {"prompt_embeds": self.zeros(batch, self.length, self.denoiser.config.joint_attention_dim)}

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Tokens with their places on four axes; the time is σ."""
        embeds, (rows, columns), batch = prompts["prompt_embeds"], noisy.shape[-2:], len(noisy)
        one = torch.arange(1)
        texts = torch.cartesian_prod(one, one, one, torch.arange(embeds.shape[1]))
        places = torch.cartesian_prod(one, torch.arange(rows), torch.arange(columns), one)
        return {
            "hidden_states": noisy.flatten(2).transpose(1, 2),
            "timestep": (1000 * times).to(noisy.dtype) / 1000,
            "encoder_hidden_states": embeds,
            "txt_ids": texts.to(noisy.device).expand(batch, -1, -1),
            "img_ids": places.to(noisy.device).expand(batch, -1, -1),
            "return_dict": False,
        }
