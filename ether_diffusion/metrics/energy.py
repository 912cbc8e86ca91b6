"""The hyperspherical energy of a layer (Sec. 5.3 and Fig. 7 of ETHER; OFT, arXiv 2306.07280)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Neurons compared with all others at a time."""


def hyperspherical_energy(weight: Tensor, chunk: int = CHUNK) -> float:
    """HE(W) = Σ_{i≠j} ‖ŵᵢ - ŵⱼ‖⁻¹ over the neurons' unit weight vectors, in fp64.

    A neuron is an output feature: a row of ``nn.Linear.weight``. Reflecting or rotating the input features, as ETHER
    and OFT do, leaves all distances between rows, and so HE, as they are.

    Args:
        weight: (f, d), any floating dtype.
        chunk: rows that are compared with all others at a time; the memory is that of (chunk, f) and (f, d) in fp64.

    Raises:
        ValueError: there are fewer than two neurons, or two have the same direction, whose energy is infinite.
    """
    if weight.ndim != 2 or len(weight) < 2:
        raise ValueError(f"a layer of at least two neurons is needed, not a weight of shape {tuple(weight.shape)}")
    unit = F.normalize(weight.double(), dim=1)
    total = 0.0
    for start in range(0, len(unit), chunk):
        rows = unit[start : start + chunk]
        # not by way of the cosines: 1 - cos loses half of the digits where two neurons are close
        distances = torch.cdist(rows, unit, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(rows), device=unit.device)
        distances[own, own + start] = torch.inf
        if (distances == 0).any():
            raise ValueError("two neurons have the same direction: their energy is infinite")
        total += distances.reciprocal().sum().item()
    return total
