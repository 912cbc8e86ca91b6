"""Z-Image: Qwen3 as text encoder, prompts of their own lengths, and a time that runs the other way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.families.lora_names import TRANSFORMER, formats, modelspec
from ether_diffusion.families.original import Z_IMAGE
from ether_diffusion.families.parts import words_of_name
from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.transformer import FlowTransformer


class ZImage(FlowTransformer):
    """Z-Image and Z-Image-Turbo (arXiv 2511.22699)."""

    NAME = "z_image"
    TITLE = "Z-Image"
    TIME = "1 - σ"
    PIPELINES = ("ZImagePipeline",)
    STEPS = 50
    GUIDANCE = 5.0
    LENGTH = 512
    CONTROL_PLACE = "all_x_embedder.2-1"
    LORA_FORMATS = formats(
        TRANSFORMER, {**TRANSFORMER, "text_encoder": "text_encoders.qwen3_4b.transformer.model."}, True
    )
    ORIGINAL = Z_IMAGE
    LORA_METADATA = modelspec("Z-Image", "https://github.com/Tongyi-MAI/Z-Image")

    @property
    def distilled(self) -> str | None:
        """Turbo is told by its name."""
        return "its name says turbo" if "turbo" in words_of_name(self.pipe) else None

    @property
    def native_resolution(self) -> int:
        """The pixels that the autoencoder was made for; the pipeline's own default is 1024 for every base."""
        return int(self.pipe.vae.config.sample_size)

    def said(self, prompt: str) -> str:
        """The beginning of the chat template before it."""
        return self.beginning(prompt, enable_thinking=True)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds: of each prompt (its tokens, features)."""
        embeds, _ = self.encode_text(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def encode_for_drawing(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Lists of embeddings, of the prompts and of the empty prompt."""
        embeds, negative = self.encode_text(prompts, do_classifier_free_guidance=True)
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}

    def batch_prompts(self, encoded: Sequence[Mapping[str, Tensor]]) -> Prompts:
        """As a list, each of its own length."""
        return {"prompt_embeds": [each["prompt_embeds"] for each in encoded]}

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        return {"prompt_embeds": [self.zeros(self.length, self.denoiser.config.cap_feat_dim) for _ in range(batch)]}

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Lists of videos of one frame and of prompts; the time is 1 - σ."""
        return {
            "x": list(noisy.unsqueeze(2).unbind(0)),
            "t": (1000 - 1000 * times) / 1000,
            "cap_feats": prompts["prompt_embeds"],
            "return_dict": False,
        }

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The velocity is the answer's negative."""
        return -torch.stack(output[0]).squeeze(2)
