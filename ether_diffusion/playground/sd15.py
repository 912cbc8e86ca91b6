"""The true architecture of Stable Diffusion 1.5 with random weights, where the real ones are out of reach.

``python -m ether_diffusion.playground.sd15 FOLDER`` writes it as a diffusers folder (4.3 GB), to check what size
alone decides: memory, time, parameter counts. Only the vocabulary is smaller: letters instead of CLIP's words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ether_diffusion.arguments import Parser
from ether_diffusion.playground.tiny import tiny_tokenizer
from ether_diffusion.ranges import SEED

UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}

SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def sd15_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """The pipeline of SD1.5 with weights drawn from ``seed``, in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        text_config = CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_attention_heads=12,
            num_hidden_layers=12,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return StableDiffusionPipeline(
            vae=AutoencoderKL(**VAE),
            text_encoder=CLIPTextModel(text_config),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**UNET),
            scheduler=PNDMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def main() -> None:
    """Write the model to the folder that the command line names."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=SEED.of(int), default=0)
    arguments = parser.parse_args()
    sd15_pipeline(arguments.seed).save_pretrained(arguments.folder)
    print(arguments.folder)


if __name__ == "__main__":
    main()
