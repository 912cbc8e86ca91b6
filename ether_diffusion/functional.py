"""The reflections of ETHER (arXiv 2405.20271) as pure functions, and their dense forms to check against.

Tokens are rows: ``x`` has shape (..., d). With n blocks, block i acts on the i-th chunk of d / n features, so a
set of vectors has shape (n, d / n) whatever n is. Every transform here is I + E with a symmetric E of rank at
most 2n. Adapters add their ``E`` (strength s means I + s E), so the ``…_delta`` functions return ``E x`` alone: a small
E keeps its precision when x is in half precision.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12
"""Floor of the norm in :func:`unit`, far below any length that training reaches."""


def unit(vectors: Tensor) -> Tensor:
    """Scale every row of ``vectors`` (n, m) to unit length; a zero row stays zero instead of turning into NaN."""
    return F.normalize(vectors, dim=-1, eps=EPSILON)


def block_columns(u: Tensor, v: Tensor | None = None) -> Tensor:
    """The columns L of a symmetric update, scaled so that E = -L Lᵀ for ETHER and E = B Aᵀ + A Bᵀ for ETHER+.

    Column i holds vector i in the rows of block i, zeros elsewhere. ETHER: L = √2 û, (d, n). ETHER+: L = [B, A] with
    B = √½ (v̂ + û) and A = √½ (v̂ - û), (d, 2n); see :func:`relaxed_reflection_delta`.

    Args:
        u: (n, d / n), not necessarily of unit length.
        v: likewise, for ETHER+.
    """
    columns: Tensor = _BlockColumns.apply(u, v)
    return columns


def reflection_delta(x: Tensor, u: Tensor, shift: Tensor | None = None) -> Tensor:
    """(H - I)(x - shift) for ETHER's H = I - 2 û ûᵀ per block (Eq. 2 of the paper).

    Args:
        x: (..., d), any floating dtype.
        u: (n, d / n), not necessarily of unit length.
        shift: (d,), subtracted from every token first: the bias, which the paper leaves untransformed.

    Returns:
        (..., d) in the dtype of x; the arithmetic runs in the wider of the dtypes of x and u.
    """
    return symmetric_update(x, block_columns(u), REFLECTION, shift, keep=False)


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
    return symmetric_update(x, block_columns(u, v), RELAXED, shift, keep=False)


REFLECTION, RELAXED = "reflection", "relaxed"
"""How the columns L of :func:`block_columns` make E: -L Lᵀ, or with their halves exchanged, B Aᵀ + A Bᵀ."""


def symmetric_update(x: Tensor, columns: Tensor, kind: str, shift: Tensor | None = None, keep: bool = True) -> Tensor:
    """x + E (x - shift), or without ``keep`` E (x - shift) alone, with an analytic backward.

    Of the activations the backward keeps x and the coefficients of the columns, k for d features.

    Args:
        x: (..., d), any floating dtype.
        columns: (d, k), of :func:`block_columns`.
        kind: ``REFLECTION`` or ``RELAXED``.
        shift: (d,), subtracted from every token first.
        keep: whether x itself is part of the result.

    Returns:
        (..., d) in the dtype of x; the arithmetic runs in the wider of the dtypes of x and columns.
    """
    updated: Tensor = _SymmetricUpdate.apply(x, columns, shift, kind, keep)
    return updated


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


class _BlockColumns(torch.autograd.Function):
    """L of û (and v̂) on the block diagonal; a few operations instead of a graph of twenty.

    With g the gradient of a unit direction, that of the free vector is (g - û (û·g)) / ‖u‖. The backward is made of
    differentiable operations on the inputs, so double backward is right as well.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor | None) -> Tensor:
        ctx.save_for_backward(u, v)
        n_blocks, width = u.shape
        if v is None:
            parts = (unit(u) * 2**0.5)[None]
        else:
            u, v = unit(torch.stack([u, v])) * 0.5**0.5
            parts = torch.stack([v + u, v - u])
        columns = u.new_zeros(n_blocks, width, len(parts), n_blocks)
        columns.diagonal(dim1=0, dim2=3).permute(1, 2, 0).copy_(parts)  # (parts, n, width)
        return columns.view(n_blocks * width, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, v = ctx.saved_tensors
        n_blocks, width = u.shape
        diagonal = gradients[0].reshape(n_blocks, width, -1, n_blocks).diagonal(dim1=0, dim2=3).permute(1, 2, 0)
        if v is None:
            return _free(u, diagonal[0] * 2**0.5), None
        both = torch.stack([diagonal[0] - diagonal[1], diagonal[0] + diagonal[1]]) * 0.5**0.5
        grad_u, grad_v = _free(torch.stack([u, v]), both)
        return grad_u, grad_v


def _free(vectors: Tensor, grad: Tensor) -> Tensor:
    """The gradient of free vectors (..., m) from that of their unit directions."""
    norm = vectors.norm(dim=-1, keepdim=True).clamp_min(EPSILON)
    direction = vectors / norm
    return (grad - direction * (direction * grad).sum(-1, keepdim=True)) / norm


class _SymmetricUpdate(torch.autograd.Function):
    """y = x + M(c) Lᵀ with c = (x - s) L, M(c) = -c or c with its halves exchanged; E = L M Lᵀ is symmetric.

    With e = g L: dx = g + M(e) Lᵀ, dL = (x - s)ᵀ M(e) + gᵀ M(c), ds = -Σ M(e) Lᵀ. For ETHER this is the gradient of
    the direction -2 Σ [(û·x) g + (û·g) x]. Under ``create_graph`` the coefficients are computed anew from the inputs,
    so that double backward is right as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Tensor, shift: Tensor | None, kind: str, keep: bool) -> Tensor:
        ctx.kind, ctx.keep = kind, keep
        with _no_autocast(x):
            coefficients = _coefficients(x, columns, shift)
            ctx.save_for_backward(x, columns, shift, coefficients)
            return _add(x if keep else None, _mixed(coefficients, kind), columns, x.shape, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, columns, shift, coefficients = ctx.saved_tensors
        needs_x, needs_columns, needs_shift = ctx.needs_input_grad[:3]
        grad, grad_x, grad_columns, grad_shift = gradients[0], None, None, None
        with _no_autocast(x):
            if torch.is_grad_enabled():
                coefficients = _coefficients(x, columns, shift)
            pulled = _mixed(_coefficients(grad, columns, None), ctx.kind)
            if needs_x:
                grad_x = _add(grad if ctx.keep else None, pulled, columns, x.shape, x.dtype)
            if needs_columns:
                dtype = pulled.dtype
                grad_columns = _rows(x).to(dtype).mT @ pulled
                grad_columns = grad_columns + _rows(grad).to(dtype).mT @ _mixed(coefficients, ctx.kind)
                if shift is not None:
                    grad_columns = grad_columns - torch.outer(shift.to(dtype), pulled.sum(0))
                grad_columns = grad_columns.to(columns.dtype)
            if needs_shift:
                grad_shift = -(pulled.sum(0) @ columns.to(pulled.dtype).mT).to(shift.dtype)
        return grad_x, grad_columns, grad_shift, None, None


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off for the device of x; where it is off already, entering it would cost as much as the arithmetic."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def _coefficients(x: Tensor, columns: Tensor, shift: Tensor | None) -> Tensor:
    """(x - shift) L, (tokens, k); the shift is taken off the k coefficients, not off every token."""
    dtype = torch.promote_types(x.dtype, columns.dtype)
    columns = columns.to(dtype)
    coefficients = _rows(x).to(dtype) @ columns
    return coefficients if shift is None else coefficients - shift.to(dtype) @ columns


def _mixed(coefficients: Tensor, kind: str) -> Tensor:
    """M(c): the coefficients that the columns are to be added with."""
    return -coefficients if kind == REFLECTION else coefficients.roll(coefficients.shape[-1] // 2, -1)


def _add(x: Tensor | None, coefficients: Tensor, columns: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """x + coefficients Lᵀ in ``dtype`` and ``shape``; in one pass where x has the dtype of the arithmetic."""
    columns = columns.to(coefficients.dtype).mT
    if x is not None and x.dtype == coefficients.dtype:
        return torch.addmm(_rows(x), coefficients, columns).view(shape)
    delta = (coefficients @ columns).to(dtype).view(shape)
    return delta if x is None else x + delta


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
