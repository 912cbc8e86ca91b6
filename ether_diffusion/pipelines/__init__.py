"""The verbs on a diffusers pipeline."""

from ether_diffusion.pipelines.verbs import (
    disable,
    disabled,
    enable,
    fuse,
    load,
    save,
    set_adapters,
    unfuse,
    unload,
)

__all__ = ["disable", "disabled", "enable", "fuse", "load", "save", "set_adapters", "unfuse", "unload"]
