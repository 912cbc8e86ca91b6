"""ETHER: one hyperplane reflection of the input features (arXiv 2405.20271, Sec. 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ether_diffusion.methods.base import Reflection, directions


class Ether(Reflection):
    """y = weight (H x) + bias with H = I - 2 û ûᵀ per block; ``u``: (n_blocks, in_features / n_blocks).

    Not the identity at the start: the distance ‖H - I‖_F is 2 √n_blocks whatever u is.
    """

    def __init__(self, in_features: int, out_features: int, n_blocks: int, generator: torch.Generator) -> None:
        super().__init__()
        self.u = directions(n_blocks, in_features, generator)

    def vectors(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """u of the input side."""
        return ((self.u, None),)
