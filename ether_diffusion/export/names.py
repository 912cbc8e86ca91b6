"""How readers of LoRA files call the layers of a model: dotted names, or kohya's with underscores."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ether_diffusion.export.factors import ExportError, LoraLayer
from ether_diffusion.families.protocol import Family

DOTTED = ("lora_A.weight", "lora_B.weight")
"""Ends of the keys of down (rank, in) and up (out, rank)."""
KOHYA = ("lora_down.weight", "lora_up.weight")

Keys = tuple[str, str]
"""Of down and up."""


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
    if kind not in family.LORA_FORMATS:
        offered = " or ".join(family.LORA_FORMATS) or "none: no reader is known that takes a LoRA of it"
        raise ExportError(f"{family.TITLE} has no LoRA format {kind!r}; it has {offered}")
    keys: dict[str, Keys] = {}
    for where, layer in layers.items():
        stem = family.lora_stem(layer.component, layer.path, kind)
        if stem is None:
            known = ", ".join(family.LORA_FORMATS[kind])
            raise ExportError(
                f"readers of the format {kind} know no name for {where} and would ignore it; of {family.TITLE} they "
                f"take {known}: export an adapter without that layer, or in another format"
            )
        down, up = DOTTED if "." in stem else KOHYA
        keys[where] = (f"{stem}.{down}", f"{stem}.{up}")
    return keys


def tensors_of(layers: Mapping[str, LoraLayer], keys: Mapping[str, Keys]) -> dict[str, Tensor]:
    """The tensors of a file by their keys, fp64."""
    pairs = [(keys[where], layer) for where, layer in layers.items()]
    return {key: value for (down, up), layer in pairs for key, value in ((down, layer.down), (up, layer.up))}
