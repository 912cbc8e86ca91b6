"""ETHER+: the relaxed reflection, on both sides of the projection (arXiv 2405.20271, Sec. 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ether_diffusion.functional import RELAXED, block_columns, relaxed_reflection_delta, symmetric_update
from ether_diffusion.methods.base import Method, directions


class EtherPlus(Method):
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

    def input_delta(self, x: Tensor) -> Tensor:
        """(H⁺ - I) x."""
        return relaxed_reflection_delta(x, self.u, self.v)

    def output_delta(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """(H⁺_out - I)(y - bias)."""
        if not self.two_sided:
            return super().output_delta(y, bias)
        return relaxed_reflection_delta(y, self.u_out, self.v_out, bias)

    def transform_input(self, x: Tensor) -> Tensor:
        """H⁺ x, in one pass."""
        return symmetric_update(x, block_columns(self.u, self.v), RELAXED)

    def transform_output(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """H⁺_out (y - bias) + bias, in one pass."""
        if not self.two_sided:
            return super().transform_output(y, bias)
        return symmetric_update(y, block_columns(self.u_out, self.v_out), RELAXED, bias)
