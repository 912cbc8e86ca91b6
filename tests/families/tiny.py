"""Tiny pipelines of every family, built from the real classes with random weights, without any file or network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.settings import FamilySettings
from ether_diffusion.playground.tiny import tiny_pipeline

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-"


def clip_tokenizer(length: int = 77) -> Any:
    """Of single bytes."""
    bytes_ = sorted(ByteLevel.alphabet())
    tokens = [*bytes_, *(f"{each}</w>" for each in bytes_), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def clip(projection: bool, length: int = 77) -> nn.Module:
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
        max_position_embeddings=length,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def t5_tokenizer() -> Any:
    """Of single letters."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def t5(width: int) -> tuple[Any, nn.Module]:
    """Tokenizer and encoder."""
    config = transformers.T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return t5_tokenizer(), transformers.T5EncoderModel(config)


def gemma() -> tuple[Any, nn.Module]:
    """Tokenizer of single letters, and decoder of width 16."""
    vocabulary = {token: number for number, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS))}
    tokenizer = transformers.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=8192)
    config = transformers.Gemma2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return tokenizer, transformers.Gemma2Model(config)


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


def autoencoder(channels: int = 16, factor: int = 2, shift: float | None = 0.06) -> nn.Module:
    """``factor`` pixels per latent."""
    blocks = factor.bit_length()
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16, 16, 16)[:blocks],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        scaling_factor=1.5,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux2_autoencoder() -> nn.Module:
    """Four channels, two pixels per latent; its statistics are random."""
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
    return autoencoder_


def qwen_autoencoder() -> nn.Module:
    """Four channels with statistics that are not those of any other, two pixels per latent."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.05],
        latents_std=[1.2, 0.8, 1.5, 1.0],
    )


def sd3(with_t5: bool = True, dual: bool = False) -> DiffusionPipeline:
    """Stable Diffusion 3, whose T5 may be missing; of 3.5 medium the first blocks have two attentions."""
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
        dual_attention_layers=(0,) if dual else (),
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
    """FLUX.2 klein."""
    return diffusers.Flux2KleinPipeline(
        transformer=flux2_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_autoencoder(),
        text_encoder=transformers.Qwen3ForCausalLM(qwen3_config(28)),
        tokenizer=qwen_tokenizer(),
    )


def qwen_image() -> DiffusionPipeline:
    """Qwen-Image."""
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
        vae=qwen_autoencoder(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=qwen_tokenizer(),
    )


def z_image() -> DiffusionPipeline:
    """Z-Image."""
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 8, 8],
        axes_lens=[256, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # which the class leaves as memory was
        nn.init.normal_(token, std=0.1)
    return diffusers.ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=transformers.Qwen3Model(qwen3_config(3)),
        tokenizer=qwen_tokenizer(),
    )


def chroma() -> DiffusionPipeline:
    """Chroma."""
    tokenizer, text_encoder = t5(32)
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def aura_flow() -> DiffusionPipeline:
    """AuraFlow."""
    config = transformers.UMT5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "attn" in name or "proj_out" in name:
                parameter.mul_(6)  # as it is initialised, nobody would see what attention does
    return diffusers.AuraFlowPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=autoencoder(channels=4, shift=None),
        text_encoder=transformers.UMT5EncoderModel(config),
        tokenizer=t5_tokenizer(),
    )


def pixart_sigma() -> DiffusionPipeline:
    """PixArt-Σ, with a learned variance."""
    tokenizer, text_encoder = t5(32)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=32,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=32,
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
        vae=autoencoder(channels=4, shift=None),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def sana(solver: bool = False) -> DiffusionPipeline:
    """Sana, whose scheduler may be a solver for many kinds of noise."""
    tokenizer, text_encoder = gemma()
    autoencoder_ = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    )
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
        timestep_scale=0.5,
    )
    flow_solver = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        transformer=transformer,
        scheduler=flow_solver if solver else FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder_,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def lumina2() -> DiffusionPipeline:
    """Lumina-Image 2.0; its pipeline takes eight pixels per latent for granted."""
    tokenizer, text_encoder = gemma()
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 32, 32),
        cap_feat_dim=16,
    )
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(channels=4, factor=8),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def hidream(solver: bool = False) -> DiffusionPipeline:
    """HiDream-I1, made for pictures of 32 x 32."""
    tokenizer_3, text_encoder_3 = t5(32)
    llama = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(24, 24),
        llama_layers=[0, 1],
    )
    flow_solver = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.HiDreamImagePipeline(
        transformer=transformer,
        scheduler=flow_solver if solver else FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(channels=4),
        text_encoder=clip(True, 248),
        tokenizer=clip_tokenizer(248),
        text_encoder_2=clip(True, 248),
        tokenizer_2=clip_tokenizer(248),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        text_encoder_4=transformers.LlamaForCausalLM(llama),
        tokenizer_4=qwen_tokenizer(),
    )
    pipe.default_sample_size = 16
    return pipe


def qwen3_vl(layers: int) -> nn.Module:
    """Qwen3-VL of width 16."""
    text = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_scaling": {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_type": "default"},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    return transformers.Qwen3VLModel(config)


def krea2(distilled: bool = False) -> DiffusionPipeline:
    """Krea 2; Turbo is distilled."""
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.Krea2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=qwen_autoencoder(),
        text_encoder=qwen3_vl(2),
        tokenizer=qwen_tokenizer(),
        text_encoder_select_layers=(1, 2),
        is_distilled=distilled,
    )


def ideogram4() -> DiffusionPipeline:
    """Ideogram 4."""

    def transformer() -> nn.Module:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16 * 13,
            mrope_section=(4, 2, 2),
        )

    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT.replace("message.content", "message.content[0].text")
    return diffusers.Ideogram4Pipeline(
        transformer=transformer(),
        unconditional_transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_autoencoder(),
        text_encoder=qwen3_vl(36),
        tokenizer=tokenizer,
    )


FLOW: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd3": sd3,
    "sd3 without T5": lambda: sd3(with_t5=False),
    "flux": flux,
    "flux schnell": lambda: flux(guidance=False),
    "flux2": flux2,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "chroma": chroma,
    "aura_flow": aura_flow,
    "sana": sana,
    "sana with a solver": lambda: sana(solver=True),
    "lumina2": lumina2,
    "hidream": hidream,
    "hidream with a solver": lambda: hidream(solver=True),
    "krea2": krea2,
    "krea2 turbo": lambda: krea2(distilled=True),
    "ideogram4": ideogram4,
}
"""Pipelines of flow matching, by what the tests call them."""

VARIANTS: dict[str, Callable[[], DiffusionPipeline]] = {"sd3.5": lambda: sd3(dual=True)}
"""Pipelines with layers that others of their family do not have."""

DIFFUSION: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": tiny_pipeline,
    "sdxl": lambda: tiny_pipeline(xl=True),
    "pixart_sigma": pixart_sigma,
}
"""Pipelines with DDPM noise."""


def build(name: str) -> DiffusionPipeline:
    """A pipeline with random weights, always the same, in evaluation mode.

    Weights that a class initialises with zeros would hide mistakes: they are random, too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = (FLOW | DIFFUSION | VARIANTS)[name]()
        for part in pipe.components.values():
            if not isinstance(part, nn.Module):
                continue
            for parameter in part.parameters():
                if parameter.dim() > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.05)
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def family_in_test(pipe: DiffusionPipeline, **settings: Any) -> Family:
    """The family around a pipeline, with short prompts where its own length would take seconds."""
    if type(pipe).__name__ == "Ideogram4Pipeline":
        settings["max_sequence_length"] = 64
    return family_of(pipe, FamilySettings(**settings))


def drawn_size(pipe: DiffusionPipeline, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the pictures that a pipeline draws for those asked for, or the next that it takes."""
    unit, scale = 1, 1.0
    if type(pipe).__name__ == "SanaPipeline":
        unit, scale = 32, 1.5
    if type(pipe).__name__ == "HiDreamImagePipeline":  # it keeps the number of pixels
        unit = 2 * pipe.vae_scale_factor
        scale = pipe.default_sample_size * pipe.vae_scale_factor / math.sqrt(size[0] * size[1])
    height, width = (int(side * scale // unit * unit) for side in size)
    return height, width
