"""A plan folded into a weight, and the way back: the base's weight, unless something else has changed it since."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ether_diffusion.core.plan import Mixture
from ether_diffusion.core.weights import checksum, same_but_for_rounding, writable_weight

_WAY_OUT = "call ether.unfuse(pipe, force=True), which restores the base without it"


@dataclass(frozen=True)
class FusedWeight:
    """What was written into the weight of one projection.

    Attributes:
        base: the base's weight, on the CPU.
        plan: whose Σ s ΔW was added.
        written: checksum of what was written.
    """

    base: Tensor
    plan: Mixture
    written: int

    @staticmethod
    def fold(module: nn.Module, plan: Mixture) -> FusedWeight:
        """Add a plan's Σ s ΔW to the weight, in place.

        Raises:
            ValueError: the weight is quantised, sharded or offloaded.
        """
        weight = writable_weight(module, "fuse into")
        base, changed = weight.detach().to("cpu", copy=True), _with_update(weight.detach(), plan)
        with torch.no_grad():
            weight.copy_(changed)
        return FusedWeight(base, plan, checksum(weight))

    def check(self, module: nn.Module, path: str, wrapped: bool, force: bool = False, way_out: str = _WAY_OUT) -> None:
        """Raise what keeps the base's weight from being put back.

        Args:
            module: the projection.
            path: its name, for the error.
            wrapped: whether PEFT has a layer around it, which may have merged and unmerged an update.
            force: whether other changes of the weight are to be dropped.
            way_out: what else can be done, for the error.

        Raises:
            ValueError: the weight is offloaded.
            RuntimeError: something else has changed the weight.
        """
        weight = writable_weight(module, "unfuse")
        if force or checksum(weight) == self.written:
            return
        cast = weight.dtype != self.base.dtype
        exact = weight.dtype.itemsize > 2  # what PEFT's merging and unmerging has rounded is nothing else there
        expected = _with_update(self.base.to(weight.device, weight.dtype), self.plan)
        if not (wrapped or cast or exact) or not same_but_for_rounding(weight.detach(), expected):
            raise RuntimeError(
                f"cannot unfuse: the weight of {path} was changed since the adapter was fused into it, perhaps by a "
                f"LoRA: take that off, or {way_out}"
            )

    def restore(self, module: nn.Module) -> None:
        """Put the base's weight back; :meth:`check` says whether that is right."""
        weight = writable_weight(module, "unfuse")
        with torch.no_grad():
            weight.copy_(self.base)


@torch.no_grad()
def _with_update(base: Tensor, plan: Mixture) -> Tensor:
    """W + Σ s ΔW in the dtype of W, rounded once."""
    delta = sum((s * m.to(base.device).delta_weight(base) for m, s in plan.parts), torch.zeros((), device=base.device))
    return (base + delta).to(base.dtype)  # delta is in fp32 at least
