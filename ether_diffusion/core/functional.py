"""The reflections of ETHER (arXiv 2405.20271) as pure functions, and their dense forms to check against.

Tokens are rows: ``x`` has shape (..., d). With n blocks, block i acts on the i-th chunk of d / n features, so a
set of vectors has shape (n, d / n) whatever n is. Every transform here is I + E with an E of rank at most 2n.
Adapters add their ``E`` (strength s means I + s E), so the ``…_delta`` functions return ``E x`` alone: a small
E keeps its precision when x is in half precision.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """An update E = synthesisᵀ analysis of low rank; both (k, d), or (samples, k, d), one E per sample."""

    analysis: Tensor
    synthesis: Tensor

    @property
    def transposed(self) -> Rows:
        """The rows of Eᵀ."""
        return Rows(self.synthesis, self.analysis)

    def for_matmul(self, dtype: torch.dtype) -> Rows:
        """These rows for products with what is in ``dtype``: in it, where :func:`is_half` says so.

        Differences of vectors are taken before they are rounded: what E x loses is less than a rounding of x + E x.
        """
        if self.analysis.dtype == dtype or not is_half(dtype):
            return self
        return Rows(self.analysis.to(dtype), self.synthesis.to(dtype))


class Formula(NamedTuple):
    """How E is made of vectors u and v, both (..., n, m): h rows for every block.

    Attributes:
        halves: from u and v those of analysis and of synthesis, both (..., h, n, m).
        pulled: from u, v and the gradients of both halves the gradients of u and v; None of a vector that has none.
    """

    halves: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    pulled: Callable[[Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def _reflection(u: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """E = -2 û ûᵀ."""
    rows = (unit(u) * 2**0.5).unsqueeze(-3)
    return rows, -rows


def _reflection_pulled(u: Tensor, v: Tensor | None, analysis: Tensor, synthesis: Tensor) -> tuple[Tensor, None]:
    return _free(u, (analysis - synthesis).squeeze(-3) * 2**0.5), None


def _relaxed(u: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """E = a bᵀ + b aᵀ with a = √½ (v̂ - û) and b = √½ (v̂ + û)."""
    assert v is not None
    u, v = unit(torch.stack([u, v])) * 0.5**0.5
    rows = torch.stack([v + u, v - u], dim=-3)
    return rows, rows.flip(-3)


def _relaxed_pulled(u: Tensor, v: Tensor | None, analysis: Tensor, synthesis: Tensor) -> tuple[Tensor, Tensor]:
    assert v is not None
    b, a = (analysis + synthesis.flip(-3)).unbind(-3)
    grad_u, grad_v = _free(torch.stack([u, v]), torch.stack([b - a, b + a]) * 0.5**0.5)
    return grad_u, grad_v


def _free_lengths(u: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """E = v vᵀ - u uᵀ = a bᵀ + b aᵀ with a = √½ (v - u) and b = √½ (v + u)."""
    assert v is not None
    rows = torch.stack([v + u, v - u], dim=-3) * 0.5**0.5
    return rows, rows.flip(-3)


def _free_lengths_pulled(u: Tensor, v: Tensor | None, analysis: Tensor, synthesis: Tensor) -> tuple[Tensor, Tensor]:
    b, a = ((analysis + synthesis.flip(-3)) * 0.5**0.5).unbind(-3)
    return b - a, b + a


def _anchored(u: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """E = 2 v̂ (d - d·d û)ᵀ - 2 d ûᵀ with d = û - v̂, which is H(v) H(u) - I."""
    assert v is not None
    u, v = unit(torch.stack([u, v]))
    d = u - v
    bent = d - (d * d).sum(-1, keepdim=True) * u
    return torch.stack([bent, u], dim=-3) * 2**0.5, torch.stack([v, -d], dim=-3) * 2**0.5


def _anchored_pulled(u: Tensor, v: Tensor | None, analysis: Tensor, synthesis: Tensor) -> tuple[Tensor, None]:
    assert v is not None
    direction = unit(u)
    d = direction - unit(v)
    bent, straight = analysis.unbind(-3)
    grad = bent - (d * d).sum(-1, keepdim=True) * bent - 2 * d * (bent * direction).sum(-1, keepdim=True)
    return _free(u, (grad + straight - synthesis.select(-3, 1)) * 2**0.5), None


REFLECTION = Formula(_reflection, _reflection_pulled)
"""ETHER: h = 1, of u alone."""
RELAXED = Formula(_relaxed, _relaxed_pulled)
"""ETHER+: h = 2, of u and v."""
FREE_LENGTHS = Formula(_free_lengths, _free_lengths_pulled)
"""ETHER+ without the division by the lengths, which is not the paper's: h = 2, of u and v."""
ANCHORED = Formula(_anchored, _anchored_pulled)
"""The variant that is not the paper's: h = 2, of u and of a v that is not trained."""


def block_rows(formula: Formula, u: Tensor, v: Tensor | None = None) -> Rows:
    """The rows of E. Row i of a half holds vector i in the columns of block i, zeros elsewhere.

    Args:
        formula: what E is.
        u: (..., n, d / n), not necessarily of unit length.
        v: likewise; None for ETHER.

    Returns:
        (..., k, d), k = n for ETHER and 2n for the others.
    """
    if _transformed():
        return Rows(*[_spread(half) for half in formula.halves(u, v)])
    return Rows(*_BlockRows.apply(formula, u, v))


def reflection_delta(x: Tensor, u: Tensor, shift: Tensor | None = None) -> Tensor:
    """(H - I)(x - shift) for ETHER's H = I - 2 û ûᵀ per block (Eq. 2 of the paper).

    Args:
        x: (..., d), any floating dtype.
        u: (n, d / n), not necessarily of unit length.
        shift: (d,), subtracted from every token first: the bias, which the paper leaves untransformed.

    Returns:
        (..., d) in the dtype of x; the arithmetic runs in the wider of the dtypes of x and u.
    """
    return row_update(x, block_rows(REFLECTION, u), shift, keep=False)


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
    return row_update(x, block_rows(RELAXED, u, v), shift, keep=False)


def row_update(x: Tensor, rows: Rows, shift: Tensor | None = None, keep: bool = True) -> Tensor:
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
    updated: Tensor = _RowUpdate.apply(x, *rows, shift, keep)
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


def _spread(half: Tensor) -> Tensor:
    """(…, h, n, m) to (…, h n, n m) by plain operations, which ``torch.func`` can transform."""
    eye = torch.eye(half.shape[-2], dtype=half.dtype, device=half.device)
    return (eye.unsqueeze(-1) * half.unsqueeze(-3)).flatten(-2).flatten(-3, -2)


class _BlockRows(torch.autograd.Function):
    """The halves of a formula spread over block-diagonal rows; a few operations instead of a graph of twenty.

    The backward is made of differentiable operations on the inputs, so double backward is right as well. The inputs
    are kept by the context itself, which autograd does not free: the rows of a whole model are made at once, and
    reentrant checkpointing goes backward through them once per checkpoint.
    """

    @staticmethod
    def forward(ctx: Any, formula: Formula, u: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
        ctx.formula, ctx.vectors = formula, (u, v)
        ctx.versions = None if torch.compiler.is_compiling() else _written(u, v)
        rows = []
        for half in formula.halves(u, v):
            *lead, number, n_blocks, width = half.shape
            spread = u.new_zeros(*lead, number, n_blocks, n_blocks, width)
            spread.diagonal(dim1=-3, dim2=-2).copy_(half.mT)
            rows.append(spread.view(*lead, -1, n_blocks * width))
        return tuple(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        u, v = ctx.vectors
        if ctx.versions is not None and ctx.versions != _written(u, v):
            raise RuntimeError(
                "vectors of an adapter were changed between its forward and its backward: call backward before the step"
            )
        *lead, n_blocks, width = u.shape
        analysis, synthesis = (
            g.reshape(*lead, -1, n_blocks, n_blocks, width).diagonal(dim1=-3, dim2=-2).mT for g in gradients
        )
        return None, *ctx.formula.pulled(u, v, analysis, synthesis)


def _written(*vectors: Tensor | None) -> list[int]:
    """How often each was written to, where torch counts it."""
    return [each._version for each in vectors if each is not None and not each.is_inference()]


def _free(vectors: Tensor, grad: Tensor) -> Tensor:
    """The gradient of free vectors (..., m) from that of their unit directions: (g - û (û·g)) / ‖u‖."""
    norm = vectors.norm(dim=-1, keepdim=True).clamp_min(EPSILON)
    direction = vectors / norm
    return (grad - direction * (direction * grad).sum(-1, keepdim=True)) / norm


class _RowUpdate(torch.autograd.Function):
    """y = x + cᵀ Q with c = R (x - s)ᵀ: E = Qᵀ R.

    With e = Q gᵀ: dx = g + eᵀ R, ds = -Σ eᵀ R, dR = e (x - s) and dQ = c g. Coefficients are (k, tokens): few long
    rows, for BLAS takes up to six times longer over the same products with few columns. Under ``create_graph`` the
    coefficients are computed anew from the inputs, so that double backward is right as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, analysis: Tensor, synthesis: Tensor, shift: Tensor | None, keep: bool) -> Tensor:
        ctx.keep = keep
        with _no_autocast(x):
            tokens = as_tokens(x, analysis)
            coefficients = _coefficients(analysis, *_shifted(tokens, shift))
            trained = any(ctx.needs_input_grad[1:3])
            ctx.save_for_backward(x if trained else None, analysis, synthesis, shift, coefficients)
            return _add(x, tokens, coefficients, synthesis, keep)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, analysis, synthesis, shift, coefficients = ctx.saved_tensors
        needs_x, needs_analysis, needs_synthesis, needs_shift = ctx.needs_input_grad[:4]
        grad, grad_x, grad_analysis, grad_synthesis, grad_shift = gradients[0], None, None, None, None
        with _no_autocast(grad):
            tokens = as_tokens(grad, analysis)
            pulled = _coefficients(synthesis, tokens, None)
            if needs_x:
                grad_x = _add(grad, tokens, pulled, analysis, ctx.keep)
            if needs_analysis or needs_synthesis:
                values, rest = _shifted(as_tokens(x, analysis), shift)
                if torch.is_grad_enabled():
                    coefficients = _coefficients(analysis, values, rest)
                pooled = pulled @ values
                if rest is not None:
                    pooled = pooled - pulled.sum(-1, keepdim=True) * _like(rest, pulled)
                grad_analysis = _like(pooled, analysis)
                grad_synthesis = _like(coefficients @ tokens, synthesis)
            if needs_shift:
                falls = pulled.sum(-1, keepdim=True) * analysis
                grad_shift = _like(-falls.reshape(-1, falls.shape[-1]).sum(0), shift)
        return grad_x, grad_analysis, grad_synthesis, grad_shift, None


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
