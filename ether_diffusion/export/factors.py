"""The exact LoRA of adapters: Σ s (W' - W) = up down for every projection, in fp64.

W' = (I + E_out) W (I + E_in), and E is of rank n for ETHER, 2n for ETHER+ on a side; so W' - W is of rank n, 2n
(one-sided) or 4n at most. Ranks of several adapters add up.
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
    """

    component: str
    path: str
    down: Tensor
    up: Tensor

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
            yield LoraLayer(component, path, *_factors(module, mixture, f"{component}.{path}"))


@torch.no_grad()
def _factors(module: nn.Module, mixture: Mixture, where: str) -> tuple[Tensor, Tensor]:
    weight = plain_weight(module)
    if weight is None or weight.is_meta or weight.numel() == 0:
        raise ExportError(
            f"the weight of {where} cannot be read ({type(module).__name__}, quantised or offloaded), and the LoRA of "
            "a reflection is made of it: load the base in full precision, without offloading, and export from there"
        )
    base = weight.detach().to("cpu", torch.float64)
    downs, ups = [], []
    for method, strength in mixture.parts:
        if not isinstance(method, Reflection):
            raise ExportError(
                f"{where} has a {type(method).__name__} adapter, whose update is of full rank: no LoRA is equal to it; "
                "fuse it (ether.fuse) and save the pipeline instead"
            )
        factors = low_rank_factors(base, copy.deepcopy(method).to("cpu", torch.float64).sides())
        downs.append(factors.down)
        ups.append(strength * factors.up.mT)
    return torch.cat(downs), torch.cat(ups, 1)
