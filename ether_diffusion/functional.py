"""The reflections of ETHER (arXiv 2405.20271) as pure functions, and their dense forms to check against.

Tokens are rows: ``x`` has shape (..., d). With n blocks, block i acts on the i-th chunk of d / n features, so a
set of vectors has shape (n, d / n) whatever n is. Every transform here is I + E with a symmetric E of rank at
most 2n, and the functions return ``E x`` rather than ``x + E x``: adapters add their ``E`` (strength s means
I + s E), and a small E keeps its precision when x is in half precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12
"""Floor of the norm in :func:`unit`, far below any length that training reaches."""


def unit(vectors: Tensor) -> Tensor:
    """Scale every row of ``vectors`` (n, m) to unit length; a zero row stays zero instead of turning into NaN."""
    return F.normalize(vectors, dim=-1, eps=EPSILON)


def block_columns(vectors: Tensor) -> Tensor:
    """Spread ``vectors`` (n, m) over the block diagonal: (n m, n), column i holding vector i in the rows of block i."""
    n_blocks, width = vectors.shape
    return torch.diag_embed(vectors.mT).permute(1, 0, 2).reshape(n_blocks * width, n_blocks)


def reflection_delta(x: Tensor, u: Tensor, shift: Tensor | None = None) -> Tensor:
    """(H - I)(x - shift) for ETHER's H = I - 2 û ûᵀ per block (Eq. 2 of the paper).

    Args:
        x: (..., d), any floating dtype.
        u: (n, d / n), not necessarily of unit length.
        shift: (d,), subtracted from every token first: the bias, which the paper leaves untransformed.

    Returns:
        (..., d) in the dtype of x; the arithmetic runs in the wider of the dtypes of x and u.
    """
    columns = block_columns(unit(u))
    return low_rank_delta(x, columns, -2 * columns, shift)


def relaxed_reflection_delta(x: Tensor, u: Tensor, v: Tensor, shift: Tensor | None = None) -> Tensor:
    """(H⁺ - I)(x - shift) for ETHER+'s H⁺ = I - û ûᵀ + v̂ v̂ᵀ per block (Sec. 3.3 of the paper).

    With a = v̂ - û and b = v̂ + û the update is ½ (a bᵀ + b aᵀ): exactly zero where v = u, in any precision, with
    or without fused multiply-adds; the difference of the two outer products is not.

    Args:
        x: (..., d), any floating dtype.
        u: (n, d / n).
        v: (n, d / n).
        shift: (d,), subtracted from every token first.

    Returns:
        (..., d) in the dtype of x; the arithmetic runs in the wider of the dtypes of x and u.
    """
    a, b = relaxed_factors(u, v)
    return low_rank_delta(x, torch.cat([b, a], dim=1), torch.cat([a, b], dim=1) / 2, shift)


def relaxed_factors(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The block columns (d, n) of a = v̂ - û and b = v̂ + û; see :func:`relaxed_reflection_delta`."""
    u, v = unit(u), unit(v)
    return block_columns(v - u), block_columns(v + u)


def low_rank_delta(x: Tensor, left: Tensor, right: Tensor, shift: Tensor | None = None) -> Tensor:
    """((x - shift) left) rightᵀ with the analytic backward: the only activation that it keeps is x itself.

    Args:
        x: (..., d).
        left: (d, k).
        right: (d, k).
        shift: (d,).

    Returns:
        (..., d) in the dtype of x.
    """
    delta: Tensor = _LowRankDelta.apply(x, left, right, shift)
    return delta


def block_matmul_delta(x: Tensor, blocks: Tensor) -> Tensor:
    """(N - I) x for the paper's Naive baseline, N = diag(N₁ … Nₙ) without constraints.

    Args:
        x: (..., d), any floating dtype.
        blocks: (n, d / n, d / n), N itself; N - I is taken in the dtype of ``blocks`` before any rounding.

    Returns:
        (..., d) in the dtype of x.
    """
    n_blocks, width, _ = blocks.shape
    dtype = torch.promote_types(x.dtype, blocks.dtype)
    difference = blocks - torch.eye(width, dtype=blocks.dtype, device=blocks.device)
    with torch.autocast(x.device.type, enabled=False):
        chunks = x.to(dtype).unflatten(-1, (n_blocks, width))
        # einsum makes one batched product; matmul would copy the blocks for every token
        delta = torch.einsum("...nw,nvw->...nv", chunks, difference.to(dtype)).flatten(-2)
    return delta.to(x.dtype)


def dense_reflection(u: Tensor) -> Tensor:
    """ETHER's H as a dense (d, d) matrix, for checks and for transformation distances."""
    return torch.block_diag(*(torch.eye(len(w)).to(w) - 2 * torch.outer(w, w) for w in unit(u)))


def dense_relaxed_reflection(u: Tensor, v: Tensor) -> Tensor:
    """ETHER+'s H⁺ as a dense (d, d) matrix, for checks and for transformation distances."""
    pairs = zip(unit(u), unit(v), strict=True)
    return torch.block_diag(*(torch.eye(len(w)).to(w) - torch.outer(w, w) + torch.outer(z, z) for w, z in pairs))


class _LowRankDelta(torch.autograd.Function):
    """y = ((x - s) L) Rᵀ. With c = (x - s) L and e = g R: dx = e Lᵀ, ds = -Σ dx, dL = (x - s)ᵀ e, dR = gᵀ c.

    For ETHER (L = û, R = -2 û) dL and dR add up to the gradient of the direction, -2 Σ [(û·x) g + (û·g) x].
    The backward is made of differentiable operations, so double backward is right as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, left, right, shift)
        with torch.autocast(x.device.type, enabled=False):
            coefficients = _coefficients(x, left, shift)
            return (coefficients @ right.to(coefficients.dtype).mT).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        x, left, right, shift = ctx.saved_tensors
        needs_x, needs_left, needs_right, needs_shift = ctx.needs_input_grad
        grad_x = grad_left = grad_right = grad_shift = None
        with torch.autocast(x.device.type, enabled=False):
            grad = gradients[0].to(torch.promote_types(x.dtype, left.dtype))
            pulled = grad @ right.to(grad.dtype)
            if needs_x:
                grad_x = (pulled @ left.to(grad.dtype).mT).to(x.dtype)
            if needs_left:
                grad_left = _rows(x.to(grad.dtype)).mT @ _rows(pulled)
                if shift is not None:
                    grad_left = grad_left - torch.outer(shift.to(grad.dtype), _rows(pulled).sum(0))
                grad_left = grad_left.to(left.dtype)
            if needs_right:
                grad_right = (_rows(grad).mT @ _rows(_coefficients(x, left, shift))).to(right.dtype)
            if needs_shift:
                grad_shift = -(_rows(pulled).sum(0) @ left.to(grad.dtype).mT).to(shift.dtype)
        return grad_x, grad_left, grad_right, grad_shift


def _coefficients(x: Tensor, left: Tensor, shift: Tensor | None) -> Tensor:
    """(x - shift) left, (..., k); the shift is taken off the k coefficients, not off every token."""
    dtype = torch.promote_types(x.dtype, left.dtype)
    coefficients = x.to(dtype) @ left.to(dtype)
    return coefficients if shift is None else coefficients - shift.to(dtype) @ left.to(dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
