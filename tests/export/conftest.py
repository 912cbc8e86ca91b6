"""Pipelines with adapters to export."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from families.tiny import build

import ether_diffusion as ether
from ether_diffusion.core.adapter import Adapter
from ether_diffusion.families.registry import family_of

__all__ = ["adapted", "shaken"]


def shaken(adapter: Adapter, seed: int = 0) -> Adapter:
    """An adapter far from the identity."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * parameter.std())
    return adapter


def adapted(
    family: str, targets: str = "attention", method: str = "ether_plus", name: str = "a", encoders: tuple[str, ...] = ()
) -> DiffusionPipeline:
    """A tiny pipeline with an adapter on its denoiser and on some text encoders."""
    pipe = build(family)
    pipe.set_progress_bar_config(disable=True)
    for component in (family_of(pipe).DENOISER, *encoders):
        config = ether.EtherConfig(method, targets=targets if component in ("unet", "transformer") else "attention")
        shaken(ether.attach(getattr(pipe, component), config, name), seed=len(component))
    return pipe
