"""The denoisers that the benchmarks run: real sizes with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from ether_diffusion import playground
from ether_diffusion.playground.sd15 import UNET

Batch = dict[str, Tensor]
"""The arguments of a denoiser, and ``target``, which the loss compares its output with."""

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
SD3_SMALL = SD3 | {
    "num_layers": 12,
    "num_attention_heads": 9,
    "caption_projection_dim": 576,
    "dual_attention_layers": (),
}
FLUX: dict[str, Any] = {"guidance_embeds": True}
FLUX_SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 14,
    "axes_dims_rope": (16, 24, 24),
    "guidance_embeds": True,
}
FLUX2_KLEIN_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
FLUX2_KLEIN_9B = FLUX2_KLEIN_4B | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}


@dataclass(frozen=True)
class Model:
    """A denoiser to measure.

    Attributes:
        build: makes it; a number of layers makes a shallower one of a transformer, with layers of the same size.
        pixels: the resolution that is measured unless another is asked for, 8 times the side of the latents.
    """

    build: Callable[[int | None], nn.Module]
    pixels: int


def _sd3(config: dict[str, Any]) -> Callable[[int | None], nn.Module]:
    def build(layers: int | None) -> nn.Module:
        depth = layers or config["num_layers"]
        dual = tuple(i for i in config["dual_attention_layers"] if i < depth)
        return SD3Transformer2DModel(**config | {"num_layers": depth, "dual_attention_layers": dual})

    return build


def _flux(layers: int | None) -> nn.Module:
    depths = {"num_layers": 19, "num_single_layers": 38}
    return FluxTransformer2DModel(**FLUX, **{k: layers * v // 19 for k, v in depths.items()} if layers else depths)


MODELS = {
    "sd15": Model(lambda _: UNet2DConditionModel(**UNET), 512),
    "sdxl": Model(lambda _: UNet2DConditionModel(**SDXL), 1024),
    "playground": Model(lambda _: playground.load().unet, 128),
    "sd3": Model(_sd3(SD3), 1024),
    "sd3-small": Model(_sd3(SD3_SMALL), 256),
    "flux": Model(_flux, 1024),
    "flux-small": Model(lambda _: FluxTransformer2DModel(**FLUX_SMALL), 256),
    "playground-flow": Model(lambda _: playground.load(name=playground.FLOW).transformer, 128),
}
"""sd3 is SD3.5-medium; sd3-small and flux-small have 110 and 115 M parameters; flux is FLUX.1-dev; the playground's are
the embedded ones."""


def build(name: str, layers: int | None = None, device: str = "cpu") -> nn.Module:
    """A frozen denoiser with random weights, in fp32 on the CPU and in bf16 elsewhere."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        if device != "cpu":
            torch.set_default_dtype(torch.bfloat16)  # twelve billion weights are never there in fp32
        with torch.device(device):
            model = MODELS[name].build(layers)
    finally:
        torch.set_default_dtype(before)
    if device != "cpu":
        model.to(device, torch.bfloat16)
    return model.requires_grad_(False)


def compile_blocks(model: nn.Module) -> None:
    """Compile the transformer blocks alone, in place, as diffusers' ``compile_repeated_blocks`` does."""
    if isinstance(model, SD3Transformer2DModel):  # of which diffusers does not know the blocks
        for block in model.transformer_blocks:
            block.compile()
    else:
        cast("Any", model).compile_repeated_blocks()


def make_batch(model: nn.Module, resolution: int, batch_size: int) -> Batch:
    """Random latents of a picture with ``resolution`` pixels a side, and what else the model takes.

    Raises:
        ValueError: the model is of another class.
    """
    side, like, config = resolution // 8, next(model.parameters()), cast("Any", model.config)
    shapes: dict[str, tuple[int, ...]]
    if isinstance(model, UNet2DConditionModel):
        shapes = {"sample": (4, side, side), "encoder_hidden_states": (77, config.cross_attention_dim)}
        if config.addition_embed_type == "text_time":
            shapes |= {"text_embeds": (1280,), "time_ids": (6,)}
        target = shapes["sample"]
    elif isinstance(model, SD3Transformer2DModel):
        shapes = {"hidden_states": (16, side, side), "encoder_hidden_states": (333, config.joint_attention_dim)}
        shapes |= {"pooled_projections": (config.pooled_projection_dim,)}
        target = shapes["hidden_states"]
    elif isinstance(model, FluxTransformer2DModel):
        tokens = (side // 2) ** 2
        shapes = {"hidden_states": (tokens, 64), "encoder_hidden_states": (512, 4096), "pooled_projections": (768,)}
        target = shapes["hidden_states"]
    elif isinstance(model, ZImageTransformer2DModel):
        shapes = {"x": (config.in_channels, 1, side, side), "cap_feats": (13, config.cap_feat_dim)}  # a usual caption's
        target = shapes["x"]
    else:
        raise ValueError(f"no batch for a {type(model).__name__}")
    batch = {name: torch.randn(batch_size, *shape).to(like) for name, shape in shapes.items()}
    batch["target"] = torch.randn(batch_size, *target).to(like)
    if isinstance(model, ZImageTransformer2DModel):
        return batch | {"t": torch.full((batch_size,), 0.5).to(like)}
    batch["timestep"] = torch.full((batch_size,), 0.5 if isinstance(model, FluxTransformer2DModel) else 500.0).to(like)
    if isinstance(model, FluxTransformer2DModel):
        batch |= {"guidance": torch.full((batch_size,), 3.5).to(like), "txt_ids": torch.zeros(512, 3).to(like)}
        places = torch.cartesian_prod(torch.arange(side // 2), torch.arange(side // 2))
        batch["img_ids"] = torch.cat([torch.zeros(len(places), 1), places], 1).to(like)
    return batch


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """What the model says of a batch."""
    given = {name: value for name, value in batch.items() if name not in ("target", "text_embeds", "time_ids")}
    if "time_ids" in batch:
        given["added_cond_kwargs"] = {name: batch[name] for name in ("text_embeds", "time_ids")}  # type: ignore[assignment]
    if "x" in given:
        told = {name: list(value) if name in ("x", "cap_feats") else value for name, value in given.items()}
        return torch.stack(model(**told, return_dict=False)[0])
    return model(**given, return_dict=False)[0]


def latents(batch: Batch) -> str:
    """The name of the argument that holds the noisy latents."""
    return next(name for name in ("sample", "hidden_states", "x") if name in batch)


def synchronise(batch: Batch) -> None:
    """Wait until a GPU has done what it was told."""
    if batch["target"].is_cuda:
        torch.cuda.synchronize()
