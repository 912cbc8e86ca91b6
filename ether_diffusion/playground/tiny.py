"""Small Stable Diffusion models with random weights: real classes, real files, 64 px, a few megabytes.

``python -m ether_diffusion.playground.tiny FOLDER`` writes one as a diffusers folder. Their images are noise; they
are there to run and test every step of training and inference where the real weights are out of reach.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ether_diffusion.ranges import SEED

RESOLUTION = 64
"""Side of the images in pixels: latents are 32 x 32."""


def tiny_unet(xl: bool = False, **overrides: Any) -> UNet2DConditionModel:
    """A two-level UNet with cross-attention; ``xl`` adds SDXL's time ids and pooled text embedding."""
    settings: dict[str, Any] = {
        "sample_size": RESOLUTION // 2,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64 if xl else 32,
        "attention_head_dim": 4,
    }
    if xl:
        settings |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
            "use_linear_projection": True,
        }
    return UNet2DConditionModel(**settings | overrides)


def tiny_controlnet(**overrides: Any) -> ControlNetModel:
    """A ControlNet for :func:`tiny_unet`."""
    settings: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "conditioning_embedding_out_channels": (16, 32),
    }
    return ControlNetModel(**settings | overrides)


def tiny_vae() -> AutoencoderKL:
    """An autoencoder of factor 2: 64 px images, latents of 4 x 32 x 32."""
    return AutoencoderKL(
        block_out_channels=[32, 64],
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        sample_size=RESOLUTION,
    )


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over single letters and digits, 77 tokens long."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!'-"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def tiny_text_encoder(
    tokenizer: CLIPTokenizer, projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder of width 32; ``projection`` gives the class of SDXL's second encoder."""
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=32,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def tiny_pipeline(xl: bool = False, seed: int = 0, prediction_type: str = "epsilon") -> DiffusionPipeline:
    """A Stable Diffusion (XL) pipeline with random weights drawn from ``seed``; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        parts: dict[str, Any] = {
            "vae": tiny_vae(),
            "text_encoder": tiny_text_encoder(tokenizer),
            "tokenizer": tokenizer,
            "unet": tiny_unet(xl),
            "scheduler": DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type=prediction_type,
            ),
        }
        if xl:
            second = {"text_encoder_2": tiny_text_encoder(tokenizer, projection=True), "tokenizer_2": tokenizer}
            return StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
        none = {"safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)


def main() -> None:
    """Write a tiny model to a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--xl", action="store_true", help="SDXL instead of SD")
    parser.add_argument("--seed", type=SEED.of(int), default=0)
    arguments = parser.parse_args()
    pipeline = tiny_pipeline(arguments.xl, arguments.seed)
    pipeline.save_pretrained(arguments.folder)
    sizes = {
        name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in ("unet", "vae", "text_encoder")
    }
    print(json.dumps({"folder": str(arguments.folder), "parameters": sizes}))


if __name__ == "__main__":
    main()
