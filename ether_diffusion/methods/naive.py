"""Naive: block-diagonal multiplication without constraints, the paper's control experiment (Sec. 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ether_diffusion.functional import block_matmul_delta
from ether_diffusion.methods.base import Method


class Naive(Method):
    """y = weight (N x) + bias, N = I at the start; ``blocks``: (n, d / n, d / n) with n blocks of d in_features."""

    def __init__(self, in_features: int, out_features: int, n_blocks: int, generator: torch.Generator) -> None:
        super().__init__()
        self.blocks = nn.Parameter(torch.eye(in_features // n_blocks).repeat(n_blocks, 1, 1))

    def input_delta(self, x: Tensor) -> Tensor:
        """(N - I) x."""
        return block_matmul_delta(x, self.blocks)

    def _weight_times_input(self, weight: Tensor) -> Tensor:
        """Weight (N - I): rows of the weight meet Nᵀ, since N need not be symmetric."""
        return block_matmul_delta(weight, self.blocks.mT)
