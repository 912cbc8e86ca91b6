"""What is trained, how large, how long: one architecture, and the hours or minutes that a machine can give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BASES: Mapping[str, tuple[str, ...]] = {
    "unet": ("autoencoder", "clip", "dino", "segmenter", "unet"),
    "flow": ("flow",),
}
"""The trained stages of each base in their order.

The unet needs the autoencoder and clip; the flow transformer takes both from a finished build of the other base; the
others need only the drawings.
"""
STAGES = tuple(stage for stages in BASES.values() for stage in stages)


@dataclass(frozen=True)
class Training:
    """How one stage is trained; it ends after ``steps`` or after ``minutes``, whichever is first.

    Attributes:
        steps: optimizer steps.
        batch: pictures, or for dino pairs of pictures, per step.
        lr: peak learning rate of AdamW, after ``warmup`` steps and before the cosine.
        minutes: time budget, None for as long as it takes; the learning rate falls with the time spent, too.
        ema: decay of the averaged weights that are kept, 0 for none.
        weight_decay: of the matrices; biases, norms and embeddings have none.
        save_every: steps between two checkpoints.
        log_every: steps between two points of the loss curve.
        validate_every: steps between two losses on fixed pictures, noise and times, of a stage that has one.
        bf16: whether forward passes run in bf16 under autocast, on a CPU too; on CUDA they always do.
    """

    steps: int
    batch: int
    lr: float
    minutes: float | None = None
    ema: float = 0.999
    warmup: int = 200
    weight_decay: float = 0.01
    save_every: int = 500
    log_every: int = 20
    validate_every: int = 500
    bf16: bool = False


@dataclass(frozen=True)
class Architecture:
    """The configurations of the models, as keywords of their classes' configs."""

    autoencoder: Mapping[str, Any]
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    dino: Mapping[str, Any]
    segmenter: Mapping[str, Any]
    unet: Mapping[str, Any]
    flow: Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """A machine's share.

    Attributes:
        scenes: drawn training scenes with captions and semantic maps.
        pairs: pairs of drawings of one look, for dino.
        held_out: drawn scenes of another seed for every figure.
        images: generated pictures that the judges look at.
        training: by stage.
    """

    scenes: int
    pairs: int
    held_out: int
    images: int
    architecture: Architecture
    training: Mapping[str, Training]


def _autoencoder(channels: tuple[int, ...], groups: int) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 1,
        "norm_num_groups": groups,
        "latent_channels": 4,
        "sample_size": 64,
    }


def _transformer(width: int, layers: int) -> dict[str, Any]:
    heads = max(width // 32, 1)
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _vision(width: int, layers: int) -> dict[str, Any]:
    return {**_transformer(width, layers), "image_size": 64, "patch_size": 8}


def _segmenter(widths: tuple[int, ...], reductions: tuple[int, ...], depth: int) -> dict[str, Any]:
    levels = len(widths)
    return {
        "num_encoder_blocks": levels,
        "depths": [depth] * levels,
        "hidden_sizes": list(widths),
        "sr_ratios": list(reductions),
        "num_attention_heads": [width // 16 for width in widths],
        "patch_sizes": [7] + [3] * (levels - 1),
        "strides": [2] * levels,
        "mlp_ratios": [4] * levels,
        "decoder_hidden_size": widths[-1],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
    }


def _unet(channels: tuple[int, ...], layers: int, cross: int) -> dict[str, Any]:
    return {
        "sample_size": 16,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "norm_num_groups": 16,
        "down_block_types": ("CrossAttnDownBlock2D",) * len(channels),
        "up_block_types": ("CrossAttnUpBlock2D",) * len(channels),
        "cross_attention_dim": cross,
        "attention_head_dim": tuple(width // 16 for width in channels),  # diffusers' name for the number of heads
    }


def _flow(width: int, layers: int, head: int) -> dict[str, Any]:
    return {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "dim": width,
        "n_layers": layers,
        "n_refiner_layers": 1,
        "n_heads": width // head,
        "n_kv_heads": width // head,
        "axes_dims": [head - 4 * (head // 5), 2 * (head // 5), 2 * (head // 5)],
        "axes_lens": [1024, 64, 64],
    }


PLAYGROUND = Architecture(
    autoencoder=_autoencoder((16, 32, 64), 8),
    text=_transformer(128, 3),
    vision=_vision(128, 4),
    dino=_vision(128, 4),
    segmenter=_segmenter((32, 64, 64), (4, 2, 1), 2),
    unet=_unet((64, 96, 112), 1, 128),
    flow=_flow(240, 7, 40),
)
"""What is shipped: every width divisible by 16; the unet and judges have 9.5M parameters with the text tower counted
twice, the flow transformer 8.7M."""

SMALLEST = Architecture(
    autoencoder=_autoencoder((16, 16, 16), 8),
    text=_transformer(32, 1),
    vision=_vision(32, 1),
    dino=_vision(32, 1),
    segmenter=_segmenter((16, 16), (4, 2), 1),
    unet=_unet((16, 32), 1, 32),
    flow=_flow(48, 1, 24),
)
"""Each model's class at its smallest: to try the program, not the models."""

PRESETS: Mapping[str, Preset] = {
    "gpu": Preset(
        scenes=120_000,
        pairs=50_000,
        held_out=2_048,
        images=512,
        architecture=PLAYGROUND,
        training={
            "autoencoder": Training(20_000, 256, 1e-3, minutes=6, save_every=1000),
            "clip": Training(12_000, 512, 1e-3, minutes=3, save_every=1000),
            "dino": Training(12_000, 256, 1e-3, minutes=3, save_every=1000),
            "segmenter": Training(6_000, 256, 2e-3, minutes=1.5, save_every=1000),
            "unet": Training(40_000, 512, 8e-4, minutes=8.5, ema=0.9995, save_every=1000),
            "flow": Training(60_000, 512, 1e-3, minutes=12, ema=0.9995, save_every=1000),
        },
    ),
    "cpu": Preset(
        scenes=40_000,
        pairs=20_000,
        held_out=1_024,
        images=512,
        architecture=PLAYGROUND,
        training={
            "autoencoder": Training(20_000, 8, 2e-3, minutes=60),
            "clip": Training(20_000, 64, 1e-3, minutes=90),
            "dino": Training(20_000, 64, 1e-3, minutes=15),
            "segmenter": Training(20_000, 32, 2e-3, minutes=60),
            "unet": Training(20_000, 64, 8e-4, minutes=300, save_every=200),
            "flow": Training(60_000, 64, 1e-3, minutes=480, ema=0.9995, save_every=200, validate_every=200),
        },
    ),
    "trial": Preset(
        scenes=64,
        pairs=32,
        held_out=32,
        images=8,
        architecture=SMALLEST,
        training={
            stage: Training(4, 8, 2e-3, ema=0.5, warmup=1, save_every=2, log_every=1, validate_every=2)
            for stage in STAGES
        },
    ),
}
"""``trial`` runs every stage of the program in seconds and teaches the models nothing."""
