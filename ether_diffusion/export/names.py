"""How readers of LoRA files call the layers of a model: dotted names, kohya's with underscores, or the authors' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ether_diffusion.export.factors import ExportError, LoraLayer
from ether_diffusion.families.original import Place
from ether_diffusion.families.protocol import Family

DOTTED = ("lora_A.weight", "lora_B.weight")
"""Ends of the keys of down (rank, in) and up (out, rank)."""
KOHYA = ("lora_down.weight", "lora_up.weight")


class Keys(NamedTuple):
    """Where the update of a layer is in a file.

    Attributes:
        down: key of down, (rank, in_features).
        up: key of up, (out_features, rank).
        place: the layer's outputs in a layer that consists of several; None where it is a layer of its own.
    """

    down: str
    up: str
    place: Place | None = None

    def rows(self, up: Tensor) -> Tensor:
        """The rows of ``up`` that belong to the layer, all of its inputs' ranks beside each other."""
        if self.place is None:
            return up
        own = up.roll(self.place.outputs // 2, 0) if self.place.swapped else up
        return own[self.place.start :]


def stem_of(family: Family, component: str, path: str, kind: str) -> str:
    """What the keys of a layer begin with in a file of that format.

    Raises:
        ExportError: the family has no such format, or the readers of the format know no name for the layer.
    """
    if kind not in family.LORA_FORMATS:
        offered = " or ".join(family.LORA_FORMATS) or "none: no reader is known that takes a LoRA of it"
        raise ExportError(f"{family.TITLE} has no LoRA format {kind!r}; it has {offered}")
    stem = family.lora_stem(component, path, kind)
    if stem is None:
        known = ", ".join(family.LORA_FORMATS[kind])
        raise ExportError(
            f"readers of the format {kind} know no name for {component}.{path} and would ignore it; of {family.TITLE} "
            f"they take {known}: export an adapter without that layer, or in another format"
        )
    return stem


def keys_of(layers: Mapping[str, LoraLayer], family: Family, kind: str) -> dict[str, Keys]:
    """The keys of every layer in a file of that format, by component and path.

    No alpha is written: readers then take the scale 1, whatever the rank of a layer is. An alpha equal to the rank is
    read wrongly by diffusers where ranks differ.

    Args:
        layers: the updates, by component and path.
        family: of the base, which knows the names.
        kind: one of the family's formats.

    Raises:
        ExportError: the family has no such format, or the readers of the format know no name for a layer.
    """
    keys: dict[str, Keys] = {}
    for where, layer in layers.items():
        stem = stem_of(family, layer.component, layer.path, kind)
        down, up = DOTTED if "." in stem else KOHYA
        place = family.original_place(layer.path) if kind == "original" else None
        keys[where] = Keys(f"{stem}.{down}", f"{stem}.{up}", place)
    return keys


def tensors_of(layers: Mapping[str, LoraLayer], keys: Mapping[str, Keys]) -> dict[str, Tensor]:
    """The tensors of a file by their keys, fp64.

    Of a layer that consists of several, down has the rows of all, and up is block-diagonal: rank by rank, each part
    acts on its own outputs, and parts without an adapter have none.
    """
    parts: dict[str, list[str]] = {}
    for where in layers:
        parts.setdefault(keys[where].down, []).append(where)
    tensors: dict[str, Tensor] = {}
    for down, inside in parts.items():
        key = keys[inside[0]]
        tensors[down] = torch.cat([layers[where].down for where in inside])
        if key.place is None:
            tensors[key.up] = layers[inside[0]].up
            continue
        up = torch.zeros(key.place.outputs, len(tensors[down]), dtype=torch.float64)
        column = 0
        for where in inside:
            place, layer = keys[where].place, layers[where]
            assert place is not None, f"{where} shares a layer with others"
            up[place.start : place.start + len(layer.up), column : column + layer.rank] = layer.up
            column += layer.rank
        tensors[key.up] = up.roll(-(key.place.outputs // 2), 0) if key.place.swapped else up
    return tensors
