"""The reflections of ETHER (arXiv 2405.20271) as pure functions, and their dense forms to check against.

Tokens are rows: ``x`` has shape (..., d). With n blocks, block i acts on the i-th chunk of d / n features, so a
set of vectors has shape (n, d / n) whatever n is. Every transform here is I + E with a symmetric E of rank at
most 2n. Adapters add their ``E`` (strength s means I + s E), so the ``…_delta`` functions return ``E x`` alone: a small
E keeps its precision when x is in half precision.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ether_diffusion.private import in_function_transform

EPSILON = 1e-12
"""Floor of the norm in :func:`unit`, far below any length that training reaches."""


def unit(vectors: Tensor) -> Tensor:
    """Scale every row of ``vectors`` (n, m) to unit length; a zero row stays zero instead of turning into NaN."""
    return F.normalize(vectors, dim=-1, eps=EPSILON)


class Rows(NamedTuple):
    """A symmetric update E = analysisᵀ synthesis of low rank; both (k, d), or (samples, k, d), one E per sample.

    ETHER: analysis √2 û, synthesis -√2 û, k = n. ETHER+: analysis [B, A] and synthesis [A, B] with B = √½ (v̂ + û) and
    A = √½ (v̂ - û), k = 2n. Row i of a half holds vector i in the columns of block i, zeros elsewhere.
    """

    analysis: Tensor
    synthesis: Tensor

    def for_matmul(self, dtype: torch.dtype) -> Rows:
        """These rows for products with what is in ``dtype``: in it, where :func:`is_half` says so.

        A is taken as a difference before it is rounded: what E x loses is less than a rounding of x + E x.
        """
        if self.analysis.dtype == dtype or not is_half(dtype):
            return self
        return Rows(self.analysis.to(dtype), self.synthesis.to(dtype))


def block_rows(u: Tensor, v: Tensor | None = None) -> Rows:
    """The rows of ETHER's E (from u) or of ETHER+'s (from u and v).

    Args:
        u: (..., n, d / n), not necessarily of unit length.
        v: likewise, for ETHER+.

    Returns:
        (..., k, d), k = n for ETHER and 2n for ETHER+.
    """
    if _transformed():
        return _plain_block_rows(u, v)
    return Rows(*_BlockRows.apply(u, v))


def reflection_delta(x: Tensor, u: Tensor, shift: Tensor | None = None) -> Tensor:
    """(H - I)(x - shift) for ETHER's H = I - 2 û ûᵀ per block (Eq. 2 of the paper).

    Args:
        x: (..., d), any floating dtype.
        u: (n, d / n), not necessarily of unit length.
        shift: (d,), subtracted from every token first: the bias, which the paper leaves untransformed.

    Returns:
        (..., d) in the dtype of x; the arithmetic runs in the wider of the dtypes of x and u.
    """
    return symmetric_update(x, block_rows(u), shift, keep=False)


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
    return symmetric_update(x, block_rows(u, v), shift, keep=False)


def symmetric_update(x: Tensor, rows: Rows, shift: Tensor | None = None, keep: bool = True) -> Tensor:
    """x + E (x - shift), or without ``keep`` E (x - shift) alone, with an analytic backward.

    Of the activations the backward keeps x and its k coefficients.

    Args:
        x: (..., d), any floating dtype.
        rows: of :func:`block_rows`; (k, d), or (samples, k, d) for x (samples, ..., d).
        shift: (d,), subtracted from every token first.
        keep: whether x itself is part of the result.

    Returns:
        (..., d) in the dtype of x; the arithmetic runs in the wider of the dtypes of x and rows.
    """
    if _transformed():
        tokens, shifted = as_tokens(x, rows.analysis), x if shift is None else x - shift.to(x.dtype)
        delta = as_tokens(shifted, rows.analysis) @ rows.analysis.mT @ rows.synthesis
        return ((tokens + delta) if keep else delta).to(x.dtype).view(x.shape)
    updated: Tensor = _SymmetricUpdate.apply(x, *rows, shift, keep)
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


def _transformed() -> bool:
    return not torch.compiler.is_compiling() and in_function_transform()


def _plain_block_rows(u: Tensor, v: Tensor | None) -> Rows:
    """:func:`block_rows` by plain operations, which ``torch.func`` can transform."""

    def spread(vectors: Tensor) -> Tensor:
        """(…, n, m) to (…, n, n m): row i holds vector i in the columns of block i."""
        eye = torch.eye(vectors.shape[-2], dtype=vectors.dtype, device=vectors.device)
        return (eye.unsqueeze(-1) * vectors.unsqueeze(-3)).flatten(-2)

    if v is None:
        rows = spread(unit(u) * 2**0.5)
        return Rows(rows, -rows)
    a, b = spread((unit(v) - unit(u)) * 0.5**0.5), spread((unit(v) + unit(u)) * 0.5**0.5)
    return Rows(torch.cat([b, a], -2), torch.cat([a, b], -2))


class _BlockRows(torch.autograd.Function):
    """û (and v̂) spread over block-diagonal rows; a few operations instead of a graph of twenty.

    With g the gradient of a unit direction, that of the free vector is (g - û (û·g)) / ‖u‖. The backward is made of
    differentiable operations on the inputs, so double backward is right as well. The inputs are kept by the context
    itself, which autograd does not free: the rows of a whole model are made at once, and reentrant checkpointing goes
    backward through them once per checkpoint.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.vectors = u, v
        ctx.versions = None if torch.compiler.is_compiling() else _written(u, v)
        ctx.set_materialize_grads(False)
        *lead, n_blocks, width = u.shape
        if v is None:
            halves = (unit(u) * 2**0.5).unsqueeze(-3)
        else:
            u, v = unit(torch.stack([u, v])) * 0.5**0.5
            halves = torch.stack([v + u, v - u], dim=-3)
        analysis = u.new_zeros(*lead, halves.shape[-3], n_blocks, n_blocks, width)
        analysis.diagonal(dim1=-3, dim2=-2).copy_(halves.mT)
        synthesis = -analysis if v is None else analysis.flip(-4)
        return analysis.view(*lead, -1, n_blocks * width), synthesis.view(*lead, -1, n_blocks * width)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        u, v = ctx.vectors
        if ctx.versions is not None and ctx.versions != _written(u, v):
            raise RuntimeError(
                "vectors of an adapter were changed between its forward and its backward: call backward before the step"
            )
        *lead, n_blocks, width = u.shape
        analysis, synthesis = (
            None if g is None else g.reshape(*lead, -1, n_blocks, n_blocks, width).diagonal(dim1=-3, dim2=-2).mT
            for g in gradients
        )
        if synthesis is not None:
            synthesis = -synthesis if v is None else synthesis.flip(-3)
        total = synthesis if analysis is None else analysis if synthesis is None else analysis + synthesis
        if total is None:
            return None, None
        if v is None:
            return _free(u, total.squeeze(-3) * 2**0.5), None
        b, a = total.unbind(-3)
        grad_u, grad_v = _free(torch.stack([u, v]), torch.stack([b - a, b + a]) * 0.5**0.5)
        return grad_u, grad_v


def _written(*vectors: Tensor | None) -> list[int]:
    """How often each was written to, where torch counts it."""
    return [each._version for each in vectors if each is not None and not each.is_inference()]


def _free(vectors: Tensor, grad: Tensor) -> Tensor:
    """The gradient of free vectors (..., m) from that of their unit directions."""
    norm = vectors.norm(dim=-1, keepdim=True).clamp_min(EPSILON)
    direction = vectors / norm
    return (grad - direction * (direction * grad).sum(-1, keepdim=True)) / norm


class _SymmetricUpdate(torch.autograd.Function):
    """y = x + cᵀ Q with c = R (x - s)ᵀ: E = Rᵀ Q is symmetric, and R = M Q for a signed permutation M.

    With e = R gᵀ: dx = g + eᵀ Q, ds = -Σ eᵀ Q, and dQ = e (x - s) + c g, which counts what falls to R = M Q as well.
    For ETHER this is the gradient of the direction -2 Σ [(û·x) g + (û·g) x]. Coefficients are (k, tokens): few long
    rows, for BLAS takes up to six times longer over the same products with few columns. Under ``create_graph`` the
    coefficients are computed anew from the inputs, so that double backward is right as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, analysis: Tensor, synthesis: Tensor, shift: Tensor | None, keep: bool) -> Tensor:
        ctx.keep = keep
        with _no_autocast(x):
            tokens = as_tokens(x, analysis)
            coefficients = _coefficients(analysis, *_shifted(tokens, shift))
            ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, analysis, synthesis, shift, coefficients)
            return _add(x, tokens, coefficients, synthesis, keep)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, analysis, synthesis, shift, coefficients = ctx.saved_tensors
        needs_x, _, needs_rows, needs_shift = ctx.needs_input_grad[:4]
        grad, grad_x, grad_rows, grad_shift = gradients[0], None, None, None
        with _no_autocast(grad):
            tokens = as_tokens(grad, analysis)
            pulled = _coefficients(analysis, tokens, None)
            if needs_x:
                grad_x = _add(grad, tokens, pulled, synthesis, ctx.keep)
            if needs_rows:
                values, rest = _shifted(as_tokens(x, analysis), shift)
                if torch.is_grad_enabled():
                    coefficients = _coefficients(analysis, values, rest)
                pooled = pulled @ values
                if rest is not None:
                    pooled = pooled - pulled.sum(-1, keepdim=True) * _like(rest, pulled)
                grad_rows = _like(plus_product(pooled, coefficients, tokens), synthesis)
            if needs_shift:
                falls = pulled.sum(-1, keepdim=True) * synthesis
                grad_shift = _like(-falls.reshape(-1, falls.shape[-1]).sum(0), shift)
        return grad_x, None, grad_rows, grad_shift, None


def _shifted(tokens: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tokens with what is still to be taken off them.

    That is cheaper later, off k coefficients. But in half precision sums over tokens and over their shift would each be
    rounded and then cancel, so there it is taken off every token.
    """
    if shift is None or tokens.dtype.itemsize > 2:
        return tokens, shift
    return tokens - _like(shift, tokens), None


def _coefficients(rows: Tensor, tokens: Tensor, shift: Tensor | None) -> Tensor:
    """Rows (tokens - shift)ᵀ, (…, k, tokens); the shift is taken off the k coefficients, not off every token."""
    rows = _like(rows, tokens)
    coefficients = rows @ tokens.mT
    return coefficients if shift is None else coefficients - (rows @ _like(shift, rows)).unsqueeze(-1)


def _add(x: Tensor, tokens: Tensor, coefficients: Tensor, rows: Tensor, keep: bool) -> Tensor:
    """x + coefficientsᵀ rows, or that product alone, in the dtype of x; in one pass where that is the arithmetic's."""
    rows = _like(rows, tokens)
    if keep and x.dtype == tokens.dtype:
        return plus_product(tokens, coefficients.mT, rows).view(x.shape)
    delta = _like(coefficients.mT @ rows, x).view(x.shape)
    return x + delta if keep else delta


def plus_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Base + left right in one pass, for matrices or batches of them."""
    return torch.addmm(base, left, right) if base.ndim == 2 else torch.baddbmm(base, left, right)


def as_tokens(x: Tensor, rows: Tensor) -> Tensor:
    """x as (tokens, d), or (samples, tokens, d) where there are rows for every sample, in the arithmetic's dtype."""
    if x.dtype != rows.dtype:
        x = x.to(torch.promote_types(x.dtype, rows.dtype))
    return x.reshape(-1, x.shape[-1]) if rows.ndim == 2 else x.reshape(len(rows), -1, x.shape[-1])


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor in the dtype of the other; a call of ``to`` that changes nothing is not free, and there are many."""
    return tensor if tensor.dtype == other.dtype else tensor.to(other.dtype)


def is_half(dtype: torch.dtype) -> bool:
    """Whether arithmetic with activations of this dtype runs in it, and not in fp32.

    In fp16 that is so without gradients only: theirs are sums over all tokens, which would overflow long before the
    gradients of the activations do.
    """
    return dtype == torch.bfloat16 or (dtype == torch.float16 and not torch.is_grad_enabled())


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch multiplies x with a matrix: autocast's where that is on, else its own."""
    kind = x.device.type
    on = kind != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off for the device of x; where it is off already, entering it would cost as much as the arithmetic."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()
