"""HiDream-I1: two CLIP encoders, T5 and Llama, whose layers go to the transformer's blocks one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ether_diffusion.families.lora_names import TRANSFORMER, formats
from ether_diffusion.families.parts import words_of_name
from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.transformer import FlowTransformer, from_tokens

CLIP_SEES = 218
"""Tokens that the pipeline gives its CLIP encoders at most, which take 248."""


class HiDream(FlowTransformer):
    """HiDream-I1 (arXiv 2505.22705). The pipeline draws pictures of 1024² pixels in all, whatever size is asked for."""

    NAME = "hidream"
    TITLE = "HiDream-I1"
    TIME = "1000 σ"
    PIPELINES = ("HiDreamImagePipeline",)
    ENCODED = (
        "prompt_embeds_t5",
        "negative_prompt_embeds_t5",
        "prompt_embeds_llama3",
        "negative_prompt_embeds_llama3",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    TEXT_ENCODERS: ClassVar[Mapping[str, str]] = {
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
        "text_encoder_3": "tokenizer_3",
        "text_encoder_4": "tokenizer_4",
    }
    STEPS = 50
    GUIDANCE = 5.0
    LENGTH = 128
    LORA_FORMATS = formats(TRANSFORMER, TRANSFORMER)

    def misfit(self) -> str | None:
        """A scheduler of another kind of noise, or experts that pass no gradient on."""
        if self.denoiser.config.force_inference_output:
            return "its transformer was made with force_inference_output, under which its experts have no gradient"
        return super().misfit()

    @property
    def distilled(self) -> str | None:
        """Dev and Fast are told by their names."""
        words = words_of_name(self.pipe)
        return next((f"its name says {word}" for word in ("dev", "fast") if word in words), None)

    def limit(self, tokenizer: Any) -> int:
        """The pipeline never gives CLIP more than :data:`CLIP_SEES`, and the others what their tokenizers take."""
        most = CLIP_SEES if tokenizer in (self.pipe.tokenizer, self.pipe.tokenizer_2) else self.length
        return min(self.length, most, int(tokenizer.model_max_length))

    def log_shift(self) -> Callable[[int], float]:
        """The pipeline shifts for as many tokens as the transformer takes at most, with numbers of its own."""
        from diffusers.pipelines.hidream_image.pipeline_hidream_image import calculate_shift

        shift = float(calculate_shift(self.denoiser.max_seq))
        return lambda tokens: shift

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """Of T5 (batch, tokens, features), of Llama (batch, layers, tokens, features), pooled (batch, features)."""
        t5, _, llama3, _, pooled, _ = self.encode_text(prompts, do_classifier_free_guidance=False)
        return {
            "prompt_embeds_t5": t5,
            "prompt_embeds_llama3": llama3.transpose(0, 1),
            "pooled_prompt_embeds": pooled,
        }

    def batch_for_drawing(self, encoded: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Those of Llama have their batch after the layers."""
        found = super().batch_for_drawing([{k: v for k, v in each.items() if "llama3" not in k} for each in encoded])
        llama = [key for key in encoded[0] if "llama3" in key]
        return found | {key: torch.cat([each[key] for each in encoded], 1) for key in llama}

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        config = self.denoiser.config
        of_t5, of_llama = config.caption_channels
        return {
            "prompt_embeds_t5": self.zeros(batch, self.length, of_t5),
            "prompt_embeds_llama3": self.zeros(batch, len(config.llama_layers), self.length, of_llama),
            "pooled_prompt_embeds": self.zeros(batch, config.text_emb_dim),
        }

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Latents as they are, the layers of Llama before the batch; the time is 1000 σ."""
        return {
            "hidden_states": noisy,
            "timesteps": 1000 * times,
            "encoder_hidden_states_t5": prompts["prompt_embeds_t5"],
            "encoder_hidden_states_llama3": prompts["prompt_embeds_llama3"].transpose(0, 1),
            "pooled_embeds": prompts["pooled_prompt_embeds"],
            "return_dict": False,
        }

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The velocity is the answer's negative; in training mode that has the layout (batch, channels, tokens, 4)."""
        answer, (height, width) = output[0], noisy.shape[-2:]
        if self.denoiser.training:
            number = self.tokens_of((height, width))  # what follows them is padding
            answer = from_tokens(answer[:, :, :number].transpose(1, 2).flatten(2), height, width)
        return -answer
