"""Trained parameters and ranks by family and preset, counted on the real sizes without any weights.

It writes ``docs/results/targets.json``, of which ``docs/tables.py`` makes the tables in ``docs/families.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from models import FLUX, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B, SD3, SDXL
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.core.adapter import check_blocks
from ether_diffusion.core.methods import Reflection, build_method
from ether_diffusion.core.targets import Target, find_targets
from ether_diffusion.files import write_text
from ether_diffusion.pipelines.schema import vector_shapes
from ether_diffusion.playground.sd15 import UNET

RESULT = Path(__file__).parents[1] / "docs" / "results" / "targets.json"
BASES: dict[str, Callable[[], nn.Module]] = {
    "SD1.5": lambda: UNet2DConditionModel(**UNET),
    "SDXL": lambda: UNet2DConditionModel(**SDXL),
    "SD3.5-medium": lambda: SD3Transformer2DModel(**SD3),
    "FLUX.1-dev": lambda: FluxTransformer2DModel(**FLUX),
    "FLUX.2 klein 4B": lambda: Flux2Transformer2DModel(**FLUX2_KLEIN_4B),
    "FLUX.2 klein 9B": lambda: Flux2Transformer2DModel(**FLUX2_KLEIN_9B),
    "Qwen-Image": QwenImageTransformer2DModel,
    "Z-Image": ZImageTransformer2DModel,
}
"""The last two have the sizes that are their classes' defaults."""
PRESETS = ("attention", "attention+mlp", "all", "self", "cross")
METHODS: dict[str, EtherConfig] = {
    "ether": EtherConfig("ether"),
    "ether_plus_one_sided": EtherConfig("ether_plus", two_sided=False),
    "ether_plus": EtherConfig("ether_plus"),
}


def count(names: Iterable[str] = BASES) -> dict[str, Any]:
    """By base: its parameters, and by preset the Linears, the trained scalars of each method and the fused Linears."""
    found = {}
    for name in names:
        with torch.device("meta"):
            model = BASES[name]()
        presets = {preset: _of_preset(find_targets(model, preset)) for preset in PRESETS}
        found[name] = {"parameters": sum(each.numel() for each in model.parameters()), "presets": presets}
    return found


def _of_preset(targets: list[Target]) -> dict[str, Any]:
    for config in METHODS.values():
        check_blocks(targets, config)
    scalars = {
        name: sum(
            math.prod(shape) for each in targets for shape in vector_shapes(config, each.inputs, each.outputs).values()
        )
        for name, config in METHODS.items()
    }
    fused = {}
    for target in targets:
        sides = {"input": target.inputs.parts, "output": target.outputs.parts}
        if parts := {side: {part.name: part.width for part in own} for side, own in sides.items() if own[0].name}:
            ranks = {name: rank(target, config) for name, config in METHODS.items()}
            fused[target.path.rpartition(".")[2]] = {**parts, "rank": ranks}
    return {"linears": len(targets), **scalars, "fused": fused}


def rank(target: Target, config: EtherConfig) -> int:
    """What the rank of W' - W of that projection is at most, with the default number of blocks."""
    method = build_method(config, target.inputs, target.outputs, torch.Generator())
    assert isinstance(method, Reflection)
    return method.rank


if __name__ == "__main__":
    write_text(RESULT, json.dumps(count(), indent=1) + "\n")
