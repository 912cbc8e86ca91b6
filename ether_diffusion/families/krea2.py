"""Krea 2: layers of Qwen3-VL as the prompt, Qwen-Image's autoencoder, packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.transformer import PATCH, places, to_tokens
from ether_diffusion.families.video_latents import VideoLatents


class Krea2(VideoLatents):
    """Krea 2 (Krea 2026)."""

    NAME = "krea2"
    TITLE = "Krea 2"
    PIPELINES = ("Krea2Pipeline",)
    STEPS = 28
    PER_SAMPLE = "its text fusion has the tokens of all prompts as its batch"
    GUIDANCE = 4.5
    LENGTH = 512

    @property
    def distilled(self) -> str | None:
        """Turbo says it in its pipeline's settings."""
        return "its pipeline says is_distilled" if self.pipe.config.get("is_distilled") else None

    def log_shift(self) -> Callable[[int], float]:
        """Of Turbo the same for all sizes."""
        return (lambda tokens: self.MAX_SHIFT) if self.distilled else super().log_shift()

    def said(self, prompt: str) -> str:
        """The beginning of the pipeline's template before it."""
        return f"{self.pipe.prompt_template_encode_prefix}{prompt}"

    def limit(self, tokenizer: Any) -> int:
        """The beginning of the template, and the tokens of prompts but for its end."""
        pipe = self.pipe
        around = pipe.prompt_template_encode_start_idx - pipe.prompt_template_encode_num_suffix_tokens
        return super().limit(tokenizer) + int(around)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, layers, features) and their mask (batch, tokens), True where a prompt is."""
        embeds, mask = self.encode_text(prompts)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def encode_for_drawing(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Embeddings and masks, of the prompts and of the empty prompt."""
        empty = self.encode_prompts([""] * len(prompts))
        return {**self.encode_prompts(prompts), **{f"negative_{key}": value for key, value in empty.items()}}

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        config, pipe = self.denoiser.config, self.pipe
        said = len(self.tokenizers["text_encoder"](pipe.prompt_template_encode_suffix).input_ids)
        end = said - int(pipe.prompt_template_encode_num_suffix_tokens)  # none with the tokenizer of the base
        embeds = self.zeros(batch, self.length + end, config.num_text_layers, config.text_hidden_dim)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": torch.ones_like(embeds[..., 0, 0], dtype=torch.bool)}

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Tokens, the places of those of the prompt and of the picture, and a mask of the prompt; the time is σ."""
        embeds, (height, width) = prompts["prompt_embeds"], noisy.shape[-2:]
        texts, picture = torch.zeros(embeds.shape[1], 3), places(height // PATCH, width // PATCH)
        return {
            "hidden_states": to_tokens(noisy),
            "encoder_hidden_states": embeds,
            "timestep": times.to(noisy.dtype),
            "position_ids": torch.cat([texts, picture]).to(noisy.device),
            "encoder_attention_mask": prompts["prompt_embeds_mask"],
            "return_dict": False,
        }
