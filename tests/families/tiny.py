"""Tiny pipelines of every family, built from the real classes with random weights, without any file or network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from ether_diffusion.playground.tiny import tiny_pipeline

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-"


def clip_tokenizer() -> Any:
    """Of single bytes."""
    bytes_ = sorted(ByteLevel.alphabet())
    tokens = [*bytes_, *(f"{each}</w>" for each in bytes_), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip(projection: bool) -> nn.Module:
    """A text encoder of width 32."""
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def t5(width: int) -> tuple[Any, nn.Module]:
    """Tokenizer of single letters, and encoder."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)
    config = transformers.T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return tokenizer, transformers.T5EncoderModel(config)


def qwen_tokenizer() -> Any:
    """Of single bytes, with a chat template."""
    vocabulary = {token: number for number, token in enumerate(sorted(ByteLevel.alphabet()))} | {"<|endoftext|>": 256}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3_config(layers: int) -> Any:
    """Width 16."""
    return transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


def autoencoder() -> nn.Module:
    """16 channels, two pixels per latent."""
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sd3(with_t5: bool = True) -> DiffusionPipeline:
    """Stable Diffusion 3, whose T5 may be missing."""
    tokenizer_3, text_encoder_3 = t5(64) if with_t5 else (None, None)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip(True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def flux(guidance: bool = True) -> DiffusionPipeline:
    """FLUX.1 dev; schnell has no guidance and no shift by size."""
    tokenizer_2, text_encoder_2 = t5(32)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    shift = {"base_shift": 0.5, "max_shift": 1.15, "shift": 3.0} if guidance else {"shift": 1.0}
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance, **shift),
        vae=autoencoder(),
        text_encoder=clip(False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def flux2_transformer() -> nn.Module:
    """One block of each kind."""
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def flux2() -> DiffusionPipeline:
    """FLUX.2 klein; the autoencoder's statistics are random."""
    autoencoder_ = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    with torch.no_grad():
        autoencoder_.bn.running_mean.uniform_(-0.5, 0.5)
        autoencoder_.bn.running_var.uniform_(0.5, 2.0)
    return diffusers.Flux2KleinPipeline(
        transformer=flux2_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder_,
        text_encoder=transformers.Qwen3ForCausalLM(qwen3_config(28)),
        tokenizer=qwen_tokenizer(),
    )


def qwen_image() -> DiffusionPipeline:
    """Qwen-Image, with statistics of the latents that are not those of any other."""
    text = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16},
        hidden_size=16,
        vocab_size=300,
        vision_end_token_id=299,
        vision_start_token_id=298,
        vision_token_id=297,
        image_token_id=296,
        video_token_id=295,
    )
    autoencoder_ = diffusers.AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.05],
        latents_std=[1.2, 0.8, 1.5, 1.0],
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=autoencoder_,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=qwen_tokenizer(),
    )


def z_image() -> DiffusionPipeline:
    """Z-Image."""
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=transformers.Qwen3Model(qwen3_config(3)),
        tokenizer=qwen_tokenizer(),
    )


FLOW: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd3": sd3,
    "sd3 without T5": lambda: sd3(with_t5=False),
    "flux": flux,
    "flux schnell": lambda: flux(guidance=False),
    "flux2": flux2,
    "qwen_image": qwen_image,
    "z_image": z_image,
}
"""Pipelines of flow matching, by what the tests call them."""

DIFFUSION: dict[str, Callable[[], DiffusionPipeline]] = {"sd": tiny_pipeline, "sdxl": lambda: tiny_pipeline(xl=True)}
"""Pipelines with DDPM noise."""


def build(name: str) -> DiffusionPipeline:
    """A pipeline with random weights, always the same, in evaluation mode.

    Weights that a class initialises with zeros would hide mistakes: they are random, too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = (FLOW | DIFFUSION)[name]()
        for part in pipe.components.values():
            if not isinstance(part, nn.Module):
                continue
            for parameter in part.parameters():
                if parameter.dim() > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.05)
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
