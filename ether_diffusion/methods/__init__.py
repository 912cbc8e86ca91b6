"""The multiplicative methods: ETHER, ETHER+ and Naive, with one interface."""

from __future__ import annotations

import torch

from ether_diffusion.config import EtherConfig
from ether_diffusion.methods.base import Method, Reflection, Sides
from ether_diffusion.methods.ether import Ether
from ether_diffusion.methods.ether_plus import EtherPlus
from ether_diffusion.methods.naive import Naive

__all__ = ["Ether", "EtherPlus", "Method", "Naive", "Reflection", "Sides", "build_method"]


def build_method(config: EtherConfig, in_features: int, out_features: int, generator: torch.Generator) -> Method:
    """The transform that ``config`` asks for, for one Linear with weight (out_features, in_features)."""
    if config.method == "ether":
        return Ether(in_features, out_features, config.n_blocks, generator)
    if config.method == "naive":
        return Naive(in_features, out_features, config.n_blocks, generator)
    return EtherPlus(in_features, out_features, config.n_blocks, generator, config.two_sided)
