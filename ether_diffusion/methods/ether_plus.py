"""ETHER+: the relaxed reflection, on both sides of the projection (arXiv 2405.20271, Sec. 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ether_diffusion.methods.base import Reflection, directions


class EtherPlus(Reflection):
    """y = H⁺_out (weight (H⁺ x)) + bias with H⁺ = I - û ûᵀ + v̂ v̂ᵀ per block.

    ``u``, ``v``: (n_blocks, in_features / n_blocks); two-sided also ``u_out``, ``v_out``: (n_blocks,
    out_features / n_blocks). Starts as the identity, since v = u; ‖H⁺ - I‖_F stays at most √2 per block.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_blocks: int,
        generator: torch.Generator,
        two_sided: bool = True,
    ) -> None:
        super().__init__()
        self.two_sided = two_sided
        self.u = directions(n_blocks, in_features, generator)
        self.v = nn.Parameter(self.u.detach().clone())
        if two_sided:
            self.u_out = directions(n_blocks, out_features, generator)
            self.v_out = nn.Parameter(self.u_out.detach().clone())

    def vectors(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """(u, v), and (u_out, v_out) if two-sided."""
        return ((self.u, self.v), (self.u_out, self.v_out)) if self.two_sided else ((self.u, self.v),)
