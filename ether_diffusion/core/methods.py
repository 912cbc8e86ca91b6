"""ETHER, ETHER+ and Naive with one interface: what a method does to the two sides of a frozen projection.

arXiv 2405.20271, Sec. 3.2, 3.3 and 4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.functional import Rows, block_matmul_delta, block_rows, symmetric_update


class Method(nn.Module, ABC):
    """A transform of one frozen Linear with weight (out_features, in_features).

    The transformed projection is y = (I + E_out) weight ((I + E_in) x) + bias: the bias is never transformed.
    Parameters are fp32; a subclass says which sides it has.
    """

    two_sided: bool = False
    """Whether there is an E_out."""

    @abstractmethod
    def input_delta(self, x: Tensor) -> Tensor:
        """E_in x for x (..., in_features), in the dtype of x."""

    def output_delta(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """E_out (y - bias) for y (..., out_features), in the dtype of y."""
        raise TypeError(f"{type(self).__name__} does not transform the output side")

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """W' - W = (I + E_out) W (I + E_in) - W, (out_features, in_features), of W in any dtype; in fp32 at least."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        delta = self._weight_times_input(weight)
        if self.two_sided:
            delta = delta + self.output_delta((weight + delta).mT, None).mT
        return delta

    def _weight_times_input(self, weight: Tensor) -> Tensor:
        """Weight E_in; for a symmetric E_in the rows of the weight transform like tokens."""
        return self.input_delta(weight)


Sides = tuple[Rows, ...]
"""The rows of E_in and, for a two-sided method, of E_out."""


class Reflection(Method):
    """A method whose E_in and E_out are symmetric and made of unit vectors."""

    @abstractmethod
    def vectors(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """u and v (None for ETHER), of the input side and, if two-sided, of the output side."""

    def sides(self) -> Sides:
        """Rows of all sides, made for this projection alone."""
        return tuple(block_rows(u, v) for u, v in self.vectors())

    def input_delta(self, x: Tensor) -> Tensor:
        """E_in x for x (..., in_features), in the dtype of x."""
        return symmetric_update(x, block_rows(*self.vectors()[0]), keep=False)

    def output_delta(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """E_out (y - bias) for y (..., out_features), in the dtype of y."""
        if not self.two_sided:
            return super().output_delta(y, bias)
        return symmetric_update(y, block_rows(*self.vectors()[1]), bias, keep=False)


def directions(n_blocks: int, features: int, generator: torch.Generator) -> nn.Parameter:
    """A trainable (n_blocks, features / n_blocks) fp32 set of random unit vectors."""
    vectors = torch.randn(n_blocks, features // n_blocks, generator=generator)
    return nn.Parameter(torch.nn.functional.normalize(vectors, dim=-1))


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


def build_method(config: EtherConfig, in_features: int, out_features: int, generator: torch.Generator) -> Method:
    """The transform that ``config`` asks for, for one Linear with weight (out_features, in_features)."""
    if config.method == "ether":
        return Ether(in_features, out_features, config.n_blocks, generator)
    if config.method == "naive":
        return Naive(in_features, out_features, config.n_blocks, generator)
    return EtherPlus(in_features, out_features, config.n_blocks, generator, config.two_sided)
