"""Stable Diffusion XL: two CLIP text encoders, a pooled embedding, and sizes that the UNet is told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ether_diffusion.families.clip_chunks import Chunks
from ether_diffusion.families.lora_names import TWO_CLIPS, Formats, modelspec
from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.sd import StableDiffusion
from ether_diffusion.private import input_device

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SIZES = 6
"""Numbers of the sizes that the UNet is told: original size, crop corner, target size."""


KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL (arXiv 2307.01952)."""

    NAME = "sdxl"
    TITLE = "Stable Diffusion XL"
    TAG = "stable-diffusion"
    PIPELINES = ("StableDiffusionXLPipeline",)
    DERIVED = ("StableDiffusionXLControlNetPipeline",)
    TEXT_ENCODERS: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    SINGLE_FILE_TEXT: ClassVar[Mapping[str, str]] = {
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    }
    TOKEN_KEYS: ClassVar[Mapping[str, str]] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    CONTROLNET = "StableDiffusionXLControlNetPipeline"
    CONTROL = None
    LORA_FORMATS: ClassVar[Formats] = {"diffusers": {"unet": "unet.", **TWO_CLIPS}, "kohya": KOHYA, "comfyui": KOHYA}
    LORA_METADATA = modelspec(
        "stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models", "sdxl_base_v1-0"
    )

    def misfit(self) -> str | None:
        """Beside those of Stable Diffusion the refiner, which has one text encoder and starts from a picture."""
        if self.pipe.text_encoder is None:
            return "it has no text_encoder: it is the refiner, which only finishes pictures of another base"
        return super().misfit()

    def lora_stem(self, component: str, path: str, kind: str) -> str | None:
        """kohya's scripts name the UNet's blocks as the original code does."""
        if kind == "kohya" and component == self.DENOISER:
            path = original_path(path, self.denoiser.config.layers_per_block)
        return super().lora_stem(component, path, kind)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, features) and pooled_prompt_embeds (batch, features)."""
        if self.settings.prompt_chunks > 1:
            found = self.encode_in_chunks(prompts)
            embeds, pooled = found["prompt_embeds"], found["pooled_prompt_embeds"]
        else:
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                list(prompts), device=self.text_device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        if getattr(self.pipe.config, "force_zeros_for_empty_prompt", False):  # what guidance leads away from
            said = torch.tensor([bool(prompt) for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds * said[:, None, None], pooled * said[:, None]
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_for_drawing(self, prompts: Sequence[str], negative: Sequence[str] | None = None) -> dict[str, Any]:
        """Embeddings and pooled ones, of the prompts and of what guidance leads away from."""
        if self.settings.prompt_chunks > 1:
            return self.guided_in_chunks(prompts, negative)
        found = self.pipe.encode_prompt(
            list(prompts),
            device=self.text_device,
            do_classifier_free_guidance=True,
            negative_prompt=None if negative is None else list(negative),
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, found, strict=True))

    def encode_chunk(self, tokens: Mapping[str, Chunks]) -> Prompts:
        """The hidden states before the last layer of both encoders side by side, and the second one's pooled."""
        outputs = []
        for name, encoder in self.text_encoders.items():
            outputs.append(encoder(tokens[name].ids.to(input_device(encoder)), output_hidden_states=True))
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], -1).to(self.pipe.text_encoder_2.dtype)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": outputs[-1].text_embeds}

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        config = self.denoiser.config
        pooled = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim
        return {**super().blank_prompts(batch), "pooled_prompt_embeds": self.zeros(batch, pooled)}

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Beside those of Stable Diffusion the pooled prompt and six sizes."""
        added = {"text_embeds": prompts["pooled_prompt_embeds"], "time_ids": sizes.to(noisy.dtype)}
        return {**super().arguments(noisy, times, prompts, sizes), "added_cond_kwargs": added}

    def with_controlnet(self, controlnet: nn.Module) -> DiffusionPipeline:
        """diffusers' StableDiffusionXLControlNetPipeline."""
        from diffusers import StableDiffusionXLControlNetPipeline

        zeros = getattr(self.pipe.config, "force_zeros_for_empty_prompt", True)
        return StableDiffusionXLControlNetPipeline(
            **self.pipe.components, controlnet=controlnet, force_zeros_for_empty_prompt=zeros
        )


def original_path(path: str, layers_per_block: int) -> str:
    """A path of diffusers' UNet as the original code numbers blocks: input_blocks, middle_block, output_blocks.

    A level of ``layers_per_block`` layers is one longer there, by its sampling; the first input block is a convolution.
    """
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(attentions|resnets)\.(\d+)\.(.+)", path)
    if match:
        side, level, kind, layer, rest = match.groups()
        number = (layers_per_block + 1) * int(level) + int(layer) + (side == "down")
        start = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
    elif match := re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d+)\.(.+)", path):
        kind, layer, rest = match.groups()
        start = f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}"
    else:
        return path
    return f"{start}.{'emb_layers.1' if rest == 'time_emb_proj' else rest}"
