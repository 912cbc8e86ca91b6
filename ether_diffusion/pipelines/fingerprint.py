"""A short identity of base weights that survives casting and fused adapters."""

from __future__ import annotations

import hashlib

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ether_diffusion.core.host import host_of
from ether_diffusion.core.offload import on_disk
from ether_diffusion.core.targets import find_targets, find_targets_of_0_1
from ether_diffusion.core.weights import plain_weight
from ether_diffusion.families.registry import family_of

SAMPLES_PER_WEIGHT = 4096


def base_hashes(pipe: DiffusionPipeline) -> dict[str, str | None]:
    """The :func:`base_hash` of the denoiser and of each text encoder of a pipeline, by component."""
    return {name: base_hash(getattr(pipe, name)) for name in family_of(pipe).components}


def base_hash(model: nn.Module) -> str | None:
    """Hash of the signs of the attention weights: 16 hexadecimal digits, the same in fp32, bf16 and fp16.

    Casting keeps every sign, zeros included, while finetuning flips some of the thousands of small weights; so the
    same checkpoint loaded in another precision has the same hash, and another checkpoint has not. At most
    ``SAMPLES_PER_WEIGHT`` evenly spaced elements of every weight are read. Which weights are read must never change:
    those that version 0.1 found.

    Of a model without attention projections that we know all Linears are read.

    Returns:
        None where the weights cannot be read: quantised, offloaded or on the meta device.
    """
    if on_disk(model):
        return None
    host = host_of(model)
    originals = host.base_weights() if host else {}
    digest = hashlib.sha256()
    for target in find_targets_of_0_1(model) or find_targets(model, ("*",)):
        weight = originals.get(target.path, plain_weight(target.module))
        if weight is None or weight.is_meta:
            return None
        flat = weight.detach().flatten()
        signs = torch.signbit(flat[:: max(1, flat.numel() // SAMPLES_PER_WEIGHT)][:SAMPLES_PER_WEIGHT])
        digest.update(f"{target.path} {tuple(weight.shape)}".encode())
        digest.update(signs.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
