"""Qwen-Image: Qwen2.5-VL as text encoder, a video autoencoder with statistics of each channel, packed tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.families.lora_names import TRANSFORMER, formats, modelspec
from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.transformer import PATCH, FlowTransformer, to_tokens
from ether_diffusion.families.video_latents import VideoLatents

BLANK = " "
"""What guidance leads away from, as in the model card."""


class QwenImage(VideoLatents):
    """Qwen-Image (arXiv 2508.02324)."""

    NAME = "qwen_image"
    TITLE = "Qwen-Image"
    PIPELINES = ("QwenImagePipeline",)
    OPTIONS = FlowTransformer.OPTIONS | {"guidance_scale_training"}
    STEPS = 50
    GUIDANCE = 4.0
    GUIDANCE_TRAINING = 1.0
    LENGTH = 512
    CONTROL_PLACE = "img_in"
    LORA_FORMATS = formats(TRANSFORMER, {**TRANSFORMER, "text_encoder": "text_encoders.qwen25_7b.transformer.model."})
    LORA_METADATA = modelspec("Qwen-Image", "https://github.com/QwenLM/Qwen-Image")

    def lora_stem(self, component: str, path: str, kind: str) -> str | None:
        """ComfyUI's text encoder is the language model alone."""
        if component == "text_encoder":
            _, found, path = path.rpartition("language_model.")
            if not found:
                return None
        return super().lora_stem(component, path, kind)

    def said(self, prompt: str) -> str:
        """The beginning of the pipeline's template before it."""
        return str(self.pipe.prompt_template_encode).partition("{}")[0] + prompt

    def limit(self, tokenizer: Any) -> int:
        """The tokens of prompts after those of the template that the pipeline drops."""
        return super().limit(tokenizer) + int(self.pipe.prompt_template_encode_start_idx)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, longest, features) and prompt_embeds_mask (batch, longest), 1 where a prompt is."""
        embeds, mask = self.encode_text(prompts)
        if mask is None:  # all prompts have the same length
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def encode_for_drawing(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Embeddings and masks, of the prompts and of a blank, which guidance leads away from."""
        blank = self.encode_prompts([BLANK] * len(prompts))
        return {**self.encode_prompts(prompts), **{f"negative_{key}": value for key, value in blank.items()}}

    def batch_prompts(self, encoded: Sequence[Mapping[str, Tensor]]) -> Prompts:
        """Padded with zeros to the longest."""
        return {
            key: torch.nn.utils.rnn.pad_sequence([each[key] for each in encoded], batch_first=True)
            for key in encoded[0]
        }

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        embeds = self.zeros(batch, self.length, self.denoiser.config.joint_attention_dim)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": None}  # all have the same length

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Tokens, and the shape that they have as a picture; the time is σ."""
        mask, (height, width) = prompts["prompt_embeds_mask"], noisy.shape[-2:]
        return {
            "hidden_states": to_tokens(noisy),
            "timestep": (1000 * times).to(noisy.dtype) / 1000,
            "guidance": self.guidance(noisy),
            "encoder_hidden_states_mask": None if mask is None or mask.all() else mask,
            "encoder_hidden_states": prompts["prompt_embeds"],
            "img_shapes": [[(1, height // PATCH, width // PATCH)]] * len(noisy),
            "attention_kwargs": {},
            "return_dict": False,
        }

    def drawing(
        self, prompts: Sequence[str], guidance_scale: float, encoded: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Classifier-free guidance away from a blank; without guidance nothing to lead away from."""
        given = super().drawing(prompts, 0, encoded)
        del given["guidance_scale"]
        if guidance_scale <= 1:
            return {"true_cfg_scale": 1.0, **{k: v for k, v in given.items() if not k.startswith("negative")}}
        blank = {"negative_prompt": [BLANK] * len(prompts)} if encoded is None else {}
        return {"true_cfg_scale": guidance_scale, **blank, **given}
