"""Where the layers of diffusers' transformers are in the code of the models' authors: other names, q, k, v in one.

A table has the layers of diffusers that an original layer consists of, in the order of its outputs; # is the number of
a block. diffusers' functions that read single-file checkpoints are the source, and the tests' oracle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn

Table = Mapping[str, tuple[str, ...]]
"""From an original layer to the layers of diffusers that it consists of."""
Block = Mapping[str, str | tuple[str, ...]]
"""The same inside a block, without the block's name; a single layer as it is."""
_BLOCK = re.compile(r"^([\w.]*(?:blocks|layers|refiner))\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where a layer is in an original model.

    Attributes:
        name: of the original layer.
        start: the layer's first output there.
        outputs: of the original layer.
        swapped: whether the halves of its outputs are exchanged: shift and scale of a last normalisation.
    """

    name: str
    start: int
    outputs: int
    swapped: bool


def original_place(table: Table, model: nn.Module, path: str) -> Place | None:
    """Where the layer ``path`` of ``model`` is; None if the table does not have it."""
    found = _BLOCK.match(path)
    number = found.group(2) if found else ""
    general = path if found is None else f"{found.group(1)}.#.{path[found.end() :]}"
    for name, parts in table.items():
        if general in parts:
            widths = [int(model.get_submodule(part.replace("#", number)).out_features) for part in parts]  # type: ignore[arg-type]
            parent = model.get_submodule(path.rpartition(".")[0]) if "." in path else model
            before = sum(widths[: parts.index(general)])
            return Place(name.replace("#", number), before, sum(widths), isinstance(parent, AdaLayerNormContinuous))
    return None


def _inside(block: str, layers: Block, original: str) -> dict[str, tuple[str, ...]]:
    """The part of a table that is about one kind of block."""
    return {
        f"{original}.#.{name}": tuple(f"{block}.#.{part}" for part in ((parts,) if isinstance(parts, str) else parts))
        for name, parts in layers.items()
    }


def _attention(end: str, attention: str = "attn") -> tuple[str, ...]:
    return tuple(f"{attention}.{end.format(which)}" for which in "qkv")


def _embedder(name: str, original: str, embedder: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{original}.{first}": (f"{embedder}.{name}_embedder.linear_{second}",)
        for first, second in (("in_layer", 1), ("out_layer", 2))
    }


_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_DOUBLE: Block = {
    "img_attn.qkv": _attention("to_{}"),
    "txt_attn.qkv": _attention("add_{}_proj"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
_DOUBLE_FLUX1: Block = {
    **_DOUBLE,
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE_FLUX1: Block = {"linear1": (*_attention("to_{}"), "proj_mlp"), "linear2": "proj_out"}
FLUX: Table = {
    **_inside(
        "transformer_blocks",
        {**_DOUBLE_FLUX1, "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"},
        "double_blocks",
    ),
    **_inside("single_transformer_blocks", {**_SINGLE_FLUX1, "modulation.lin": "norm.linear"}, "single_blocks"),
    **_embedder("timestep", "time_in", "time_text_embed"),
    **_embedder("text", "vector_in", "time_text_embed"),
    **_embedder("guidance", "guidance_in", "time_text_embed"),
    **_ENDS,
}
CHROMA: Table = {
    **_inside("transformer_blocks", _DOUBLE_FLUX1, "double_blocks"),
    **_inside("single_transformer_blocks", _SINGLE_FLUX1, "single_blocks"),
    **_inside(
        "distilled_guidance_layer.layers",
        {"in_layer": "linear_1", "out_layer": "linear_2"},
        "distilled_guidance_layer.layers",
    ),
    **{f"distilled_guidance_layer.{name}": (f"distilled_guidance_layer.{name}",) for name in ("in_proj", "out_proj")},
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
}
FLUX2: Table = {
    **_inside(
        "transformer_blocks",
        {
            **_DOUBLE,
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
        "double_blocks",
    ),
    **_inside(
        "single_transformer_blocks", {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}, "single_blocks"
    ),
    **_embedder("timestep", "time_in", "time_guidance_embed"),
    **_embedder("guidance", "guidance_in", "time_guidance_embed"),
    **{
        f"{name}.lin": (f"{name}.linear",)
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    },
    **_ENDS,
}
SD3: Table = {
    **_inside(
        "transformer_blocks",
        {
            "x_block.attn.qkv": _attention("to_{}"),
            "x_block.attn2.qkv": _attention("to_{}", "attn2"),
            "context_block.attn.qkv": _attention("add_{}_proj"),
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.proj": "attn2.to_out.0",
            "context_block.attn.proj": "attn.to_add_out",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        },
        "joint_blocks",
    ),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_ZIMAGE_BLOCK: Block = {
    "attention.qkv": _attention("to_{}", "attention"),
    "attention.out": "attention.to_out.0",
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")},
}
Z_IMAGE: Table = {
    **_inside("layers", _ZIMAGE_BLOCK, "layers"),
    **_inside("noise_refiner", _ZIMAGE_BLOCK, "noise_refiner"),
    **_inside("context_refiner", _ZIMAGE_BLOCK, "context_refiner"),
    **{name: (name,) for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")},
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}
