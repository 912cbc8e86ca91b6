"""Bases in one file: diffusers' pipelines written with the names of the authors' code, by an inverse of our own.

diffusers has the way from these names to its own; this is the way back, written from the layout of the original code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_names(unet: nn.Module) -> dict[str, Tensor]:
    """The UNet's weights with the names of the original code: blocks counted through, first input block the conv."""
    layers = int(unet.config.layers_per_block)  # type: ignore[union-attr, arg-type]
    found = {}
    for key, value in unet.state_dict().items():
        path, _, kind = key.rpartition(".")
        if path in UNET:
            name = UNET[path]
        elif match := re.fullmatch(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path):
            number = 1 + int(match[1]) * (layers + 1) + int(match[3])
            name = f"input_blocks.{number}.{_layer(match[2], match[4])}"
        elif match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", path):
            name = f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op"
        elif match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", path):
            name = f"middle_block.{2 * int(match[1])}.{RESNET[match[2]]}"
        elif match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", path):
            name = f"middle_block.1.{match[1]}"
        elif match := re.fullmatch(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path):
            name = f"output_blocks.{int(match[1]) * (layers + 1) + int(match[3])}.{_layer(match[2], match[4])}"
        elif match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", path):
            block = int(match[1])
            beside = 2 if hasattr(unet.up_blocks[block], "attentions") else 1  # type: ignore[index, union-attr]
            name = f"output_blocks.{block * (layers + 1) + layers}.{beside}.conv"
        else:
            raise KeyError(key)
        found[f"{name}.{kind}"] = value
    return found


def _layer(kind: str, path: str) -> str:
    return f"0.{RESNET[path]}" if kind == "resnets" else f"1.{path}"


def vae_names(vae: nn.Module) -> dict[str, Tensor]:
    """The autoencoder's weights: the decoder's blocks counted from below, attention as 1 x 1 convolutions."""
    levels = len(vae.config.block_out_channels)  # type: ignore[union-attr, arg-type]
    found = {}
    for key, value in vae.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if match := re.fullmatch(r"(.+)mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            name = f"{match[1]}mid.attn_1.{ATTENTION[match[2]]}.{match[3]}"
            value = value[:, :, None, None] if value.dim() == 2 else value
        found[name] = value
    return found


def clip_names(encoder: nn.Module) -> dict[str, Tensor]:
    """A text encoder's weights with the names that they had in transformers when the checkpoints were made."""
    return {f"transformer.text_model.{key.removeprefix('text_model.')}": v for key, v in encoder.state_dict().items()}


def open_clip_names(encoder: nn.Module) -> dict[str, Tensor]:
    """The same with the names of OpenCLIP: q, k and v are one weight, the projection is the other way round."""
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T
    for key, value in state.items():
        if not (match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)):
            continue
        place, path, kind = f"transformer.resblocks.{match[1]}", match[2], match[3]
        if path in OPEN_CLIP:
            found[f"{place}.{OPEN_CLIP[path]}.{kind}"] = value
        elif path == "self_attn.q_proj":
            parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
    return found


def z_image_names(transformer: nn.Module) -> dict[str, Tensor]:
    """The weights of Z-Image's transformer: q, k and v are one weight; a norm that nothing uses comes with them."""
    found = {"norm_final.weight": torch.ones(3)}
    state = transformer.state_dict()
    for key, value in state.items():
        name = re.sub(r"^all_(x_embedder|final_layer)\.2-1", r"\1", key)
        name = re.sub(r"attention\.norm_([qk])", r"attention.\1_norm", name).replace(
            "attention.to_out.0", "attention.out"
        )
        if "attention.to_q." in name:
            value = torch.cat([state[key.replace("to_q", f"to_{part}")] for part in "qkv"])
            name = name.replace("to_q", "qkv")
        if not re.search(r"attention\.to_[kv]\.", name):
            found[name] = value
    return {f"model.diffusion_model.{name}": value for name, value in found.items()}


def original(pipe: DiffusionPipeline, open_clip: bool = False) -> dict[str, Tensor]:
    """A whole base; ``open_clip``: with the text encoder of version 2."""
    found = {f"model.diffusion_model.{key}": value for key, value in unet_names(pipe.unet).items()}
    found |= {f"first_stage_model.{key}": value for key, value in vae_names(pipe.vae).items()}
    if hasattr(pipe, "text_encoder_2"):
        found |= {f"conditioner.embedders.0.{key}": value for key, value in clip_names(pipe.text_encoder).items()}
        second = open_clip_names(pipe.text_encoder_2)
        return found | {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    if open_clip:
        text = {f"cond_stage_model.model.{key}": value for key, value in open_clip_names(pipe.text_encoder).items()}
    else:
        text = {f"cond_stage_model.{key}": value for key, value in clip_names(pipe.text_encoder).items()}
    return found | text


def write(state: dict[str, Tensor], path: Path, **metadata: str) -> Path:
    """Write a file of safetensors; the order of its names is another than diffusers has."""
    save_file({key: state[key].contiguous().clone() for key in sorted(state)}, path, metadata or None)
    return path


def settings_alone(folder: Path, target: Path, keep: tuple[str, ...] = ()) -> Path:
    """A copy of a diffusers folder without weights, but for those of the parts to ``keep``."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        inside = path.relative_to(folder)
        if path.suffix != ".safetensors" or inside.parts[0] in keep:
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            (target / inside).write_bytes(path.read_bytes())
    return target


def same_weights(left: Any, right: Any) -> bool:
    """Whether two pipelines have the same parts with the same weights and dtypes, bit for bit."""
    parts = [name for name, part in left.components.items() if isinstance(part, nn.Module)]
    assert parts == [name for name, part in right.components.items() if isinstance(part, nn.Module)]
    for name in parts:
        one, other = getattr(left, name).state_dict(), getattr(right, name).state_dict()
        if one.keys() != other.keys() or not all(
            one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
        ):
            return False
    return True
