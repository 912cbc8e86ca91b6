"""The update of a whole projection, both sides, as one product of low rank beside the frozen weight.

W' - W = (I + E_out) W (I + E_in) - W has rank 2k at most. Its factors cost four passes over the weight and nothing per
token; applied, they cost two thin products and no activation of full width but the output, which is changed in place.
Where tokens are many for the size of the weight this is cheaper, in time and memory, than to transform what goes into
the projection and what comes out of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ether_diffusion.core.functional import Rows, as_tokens, plus_product


class Factors(NamedTuple):
    """W' - W = upᵀ down: down (r, in_features), up (r, out_features), or both (samples, r, …)."""

    down: Tensor
    up: Tensor


def low_rank_factors(weight: Tensor, sides: tuple[Rows, ...]) -> Factors:
    """Factors of W' - W for the rows of E_in and, if there is one, E_out.

    With E = Qᵀ R, R the analysis and Q the synthesis, and P = Q_in Wᵀ: W E_in = Pᵀ R_in, E_out W = Q_outᵀ (R_out W),
    and E_out W E_in = ((P R_outᵀ) Q_out)ᵀ R_in. All three are exactly zero where ETHER+ has v = u.

    Args:
        weight: (out_features, in_features).
        sides: of a :class:`~ether_diffusion.core.methods`.
    """
    (analysis, synthesis), *output = sides
    product = synthesis @ weight.mT
    if not output:
        return Factors(analysis, product)
    (analysis_out, synthesis_out) = output[0]
    both = plus_product(product, product @ analysis_out.mT, synthesis_out)
    return Factors(torch.cat([analysis, analysis_out @ weight], -2), torch.cat([both, synthesis_out], -2))


def add_low_rank(y: Tensor, x: Tensor, weight: Tensor, factors: Factors) -> Tensor:
    """The frozen projection y of x, moved by x downᵀ up; in place, and without autograd's trace of the projection.

    Args:
        y: (..., out_features), a frozen Linear's own output for ``x.detach()``; it is changed.
        x: (..., in_features), of the dtype of the weight and the factors.
        weight: of that Linear, (out_features, in_features).
        factors: of :func:`low_rank_factors`; with samples, for x (samples, ...).
    """
    moved: Tensor = _AddLowRank.apply(y.contiguous(), x, weight, *factors)
    return moved


def plain_add_low_rank(y: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """The same by plain autograd, for a y that knows x; a compiler fuses it."""
    coefficients = as_tokens(x, factors.down) @ factors.down.mT
    return plus_product(as_tokens(y, factors.up), coefficients, factors.up).view(y.shape)


class _AddLowRank(torch.autograd.Function):
    """x Wᵀ + x Aᵀ G: with a = A xᵀ and b = G gᵀ, both (r, tokens), dx = g W + bᵀ A, dA = b x, dG = a g.

    Both terms of dx are one buffer, where autograd would add two.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        coefficients = down @ as_tokens(x, down).mT
        ctx.save_for_backward(x, weight, down, up, coefficients)
        ctx.mark_dirty(y)
        add_product(as_tokens(y, up), coefficients.mT, up)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, coefficients = ctx.saved_tensors
        _, needs_x, _, needs_down, needs_up = ctx.needs_input_grad
        grad, grad_x, grad_down, grad_up = as_tokens(gradients[0], up), None, None, None
        pulled = up @ grad.mT
        if needs_x:
            grad_x = add_product(grad @ weight, pulled.mT, down).view(x.shape)
        if needs_down:
            grad_down = pulled @ as_tokens(x, down)
        if needs_up:
            if torch.is_grad_enabled():
                coefficients = down @ as_tokens(x, down).mT  # so that double backward knows what they are made of
            grad_up = coefficients @ grad
        return None, grad_x, None, grad_down, grad_up


def add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Base + left right, in base."""
    return base.addmm_(left, right) if base.ndim == 2 else base.baddbmm_(left, right)
