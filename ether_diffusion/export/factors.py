"""The exact LoRA of adapters: Σ s (W' - W) = up down for every projection, in fp64.

W' = (I + E_out) W (I + E_in), and E is of rank n for ETHER, 2n for ETHER+ on a side; so W' - W is of rank n, 2n
(one-sided) or 4n at most. Ranks of several adapters add up, to the width of the layer at most.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ether_diffusion.core.low_rank import low_rank_factors
from ether_diffusion.core.methods import Reflection
from ether_diffusion.core.plan import Mixture
from ether_diffusion.core.weights import plain_weight
from ether_diffusion.pipelines.loaded import hosts_of, known_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


PROBES = 4
"""Random inputs of every layer."""
TINY = torch.finfo(torch.float64).tiny


class ExportError(ValueError):
    """An adapter cannot be written as a LoRA file; the message says why and what to do."""


@dataclass(frozen=True)
class LoraLayer:
    """The update of one projection.

    Attributes:
        component: of the pipeline.
        path: of the projection in it, canonical.
        down: (rank, in_features), fp64 on the CPU.
        up: (out_features, rank), fp64; the update is up @ down.
        probes: (PROBES, in_features), fp64: random inputs.
        moved: (PROBES, out_features), fp64: what the adapters add to the projection's output for them, computed apart
            from the factors.
    """

    component: str
    path: str
    down: Tensor
    up: Tensor
    probes: Tensor
    moved: Tensor

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return len(self.down)


def lora_layers(pipe: DiffusionPipeline, strengths: Mapping[str, float]) -> Iterator[LoraLayer]:
    """The exact updates Σ s ΔW of these adapters, projection by projection.

    Args:
        pipe: the pipeline that they are loaded in.
        strengths: by name.

    Raises:
        ExportError: an adapter is Naive, which has no low rank, or a weight cannot be read.
        RuntimeError: adapters are fused, or PEFT has merged a LoRA.
        ValueError: there is no such adapter.
    """
    for name in strengths:
        known_name(pipe, name)
    for component, host in hosts_of(pipe).items():
        for path, module, mixture in host.updates(strengths):
            yield LoraLayer(component, path, *_update(module, mixture, f"{component}.{path}"))


@torch.no_grad()
def _update(module: nn.Module, mixture: Mixture, where: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """down, up, probes and moved."""
    weight = plain_weight(module)
    if weight is None or weight.is_meta or weight.numel() == 0:
        raise ExportError(
            f"the weight of {where} cannot be read ({type(module).__name__}, quantised or offloaded), and the LoRA of "
            "a reflection is made of it: load the base in full precision, without offloading, and export from there"
        )
    base = weight.detach().to("cpu", torch.float64)
    probes = torch.randn(PROBES, base.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    downs, ups, moved = [], [], torch.zeros(PROBES, base.shape[0], dtype=torch.float64)
    for method, strength in mixture.parts:
        if not isinstance(method, Reflection):
            raise ExportError(
                f"{where} has a {type(method).__name__} adapter, whose update is of full rank: no LoRA is equal to it; "
                "fuse it (ether.fuse) and save the pipeline instead"
            )
        exact = copy.deepcopy(method).to("cpu", torch.float64)
        factors = low_rank_factors(base, exact.sides())
        downs.append(factors.down)
        ups.append(strength * factors.up.mT)
        moved += strength * probes @ exact.delta_weight(base).mT
    return *_balanced(*_within(torch.cat(downs), torch.cat(ups, 1))), probes, moved


def _within(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with a rank of at most the narrower side: no reader needs more, and files grow with it."""
    rank, inputs, outputs = len(down), down.shape[1], len(up)
    if rank <= min(inputs, outputs):
        return down, up
    if inputs <= outputs:
        return torch.eye(inputs, dtype=down.dtype), up @ down
    return up @ down, torch.eye(outputs, dtype=up.dtype)


def _balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with each row of ``down`` as long as its column of ``up``: small numbers lose bits in fp16."""
    rows, columns = down.norm(dim=1), up.norm(dim=0)
    factor = torch.where((rows > 0) & (columns > 0), (columns / rows.clamp(min=TINY)).sqrt(), 1.0)
    return down * factor[:, None], up / factor
