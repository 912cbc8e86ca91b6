"""The interface of a method: what it does to the two sides of one frozen projection."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ether_diffusion.functional import Rows, block_rows, symmetric_update


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
        """W' - W = (I + E_out) W (I + E_in) - W, (out_features, in_features) in fp32, for W of any floating dtype."""
        weight = weight.float()
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
