"""Both sides of a frozen projection around its own matmul, in one autograd function.

Autograd traces neither the projection nor what goes into it: the backward is written out. It keeps the projection's
input, which q, k and v share, and k coefficients per token; what the output side needs of the output is made again
from them, with one thin product through the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ether_diffusion.core.functional import Rows, as_tokens, plus_product
from ether_diffusion.core.low_rank import add_product
from ether_diffusion.core.methods import Sides


@torch.no_grad()
def reflect_input(x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """x + E x without a graph, and its coefficients, (…, k, tokens), for :func:`reflect_output`.

    Args:
        x: (..., in_features), in the dtype of the rows.
        rows: of E_in, (k, in_features), or (samples, k, in_features) for x (samples, ..., in_features).
    """
    tokens = as_tokens(x, rows.analysis)
    coefficients = rows.analysis @ tokens.mT
    return plus_product(tokens, coefficients.mT, rows.synthesis).view(x.shape), coefficients


def reflect_output(
    output: Tensor,
    changed: Tensor,
    x: Tensor,
    coefficients: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sides: Sides,
    keep: bool,
) -> Tensor:
    """(I + E_out) W (I + E_in) x + bias, with gradients of x and of the rows; in place unless ``keep``.

    Args:
        output: (..., out_features), W (x + E_in x) + bias without a graph; it is changed unless ``keep``.
        changed: x + E_in x, of :func:`reflect_input`.
        x: (..., in_features).
        coefficients: of :func:`reflect_input`.
        weight: W, (out_features, in_features); it must not need a gradient.
        bias: (out_features,) or None, likewise.
        sides: one or two, in the dtype of x and of the weight.
        keep: whether ``output`` is kept for the backward: that saves a pass over the weight, which for a few tokens is
            more work than a pass over them.
    """
    rows = tuple([each for of_side in sides for each in of_side])
    if not torch.is_grad_enabled():
        return _with_output_side(output, changed, weight, bias, rows[2:], keep=False)[0]
    moved: Tensor = _Reflect.apply(output, changed, x, coefficients, weight, bias, keep, *rows)
    return moved


def _with_output_side(
    output: Tensor, changed: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[Tensor, ...], keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The output with E_out added, in place unless ``keep``, and the coefficients of that; it itself without rows."""
    if not rows:
        return output, None
    analysis, synthesis = rows
    tokens = as_tokens(output, analysis)
    if bias is None:
        pulled = analysis @ tokens.mT
    elif bias.dtype.itemsize > 2:
        pulled = analysis @ tokens.mT - (analysis @ bias).unsqueeze(-1)
    else:  # in half precision the bias would be rounded into every token, and cancelled
        pulled = (analysis @ weight) @ as_tokens(changed, analysis).mT
    if keep:
        return plus_product(tokens, pulled.mT, synthesis).view(output.shape), pulled
    add_product(tokens, pulled.mT, synthesis)
    return output, pulled


def _reflected(x: Tensor, weight: Tensor, rows: list[Tensor]) -> Tensor:
    """W' x by plain operations, without the bias."""
    tokens = as_tokens(x, rows[0])
    tokens = plus_product(tokens, tokens @ rows[0].mT, rows[1]) @ weight.mT
    return plus_product(tokens, tokens @ rows[2].mT, rows[3]) if len(rows) == 4 else tokens


class _Reflect(torch.autograd.Function):
    """y = z + b + eᵀ Q₂ with z = W x', e = R₂ zᵀ; x' = x + cᵀ Q₁ with c = R₁ xᵀ.

    With q = Q₂ gᵀ and g_z = g + qᵀ R₂: dR₂ = q z, dQ₂ = e g, dx' = g_z W; with p = Q₁ dx'ᵀ: dR₁ = p x, dQ₁ = c dx',
    dx = dx' + pᵀ R₁. q z is (q x') Wᵀ, and q x' = q x + (q cᵀ) Q₁: neither z nor x' is needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        changed: Tensor,
        x: Tensor,
        coefficients: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        keep: bool,
        *rows: Tensor,
    ) -> Tensor:
        trained = any(ctx.needs_input_grad[7:])
        kept = (x, coefficients) if trained else (None, None)
        moved, pulled = _with_output_side(output, changed, weight, bias, rows[2:], keep)
        ctx.save_for_backward(*kept, weight, bias, pulled, output if keep and trained and rows[2:] else None, *rows)
        if moved is output:
            ctx.mark_dirty(output)
        return moved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, c, weight, bias, pulled, out, *rows = ctx.saved_tensors
        needs_x, needs_rows = ctx.needs_input_grad[2], any(ctx.needs_input_grad[7:])
        if torch.is_grad_enabled():
            return _differentiable(gradients[0], x, weight, rows, ctx.needs_input_grad)
        analysis, synthesis, *output_rows = rows
        grad = as_tokens(gradients[0], analysis)
        tokens = as_tokens(x, analysis) if needs_rows else grad
        grad_rows: list[Tensor | None] = [None] * len(rows)
        if output_rows:
            analysis_out, synthesis_out = output_rows
            q = synthesis_out @ grad.mT
            if needs_rows:
                if out is None:
                    grad_rows[2] = plus_product(q @ tokens, q @ c.mT, synthesis) @ weight.mT
                else:
                    out = as_tokens(out, analysis)
                    grad_rows[2] = q @ (out if bias is None else out - bias)
                grad_rows[3] = pulled @ grad
            grad = plus_product(grad, q.mT, analysis_out)
        grad = grad @ weight
        p = synthesis @ grad.mT
        if needs_rows:
            grad_rows[0], grad_rows[1] = p @ tokens, c @ grad
        grad_x = None
        if needs_x:
            add_product(grad, p.mT, analysis)
            grad_x = grad.view(*gradients[0].shape[:-1], weight.shape[1])
        return None, None, grad_x, None, None, None, None, *grad_rows


def _differentiable(
    grad: Tensor, x: Tensor | None, weight: Tensor, rows: list[Tensor], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of all inputs, for a backward through the backward."""
    if x is None:  # only the gradient of x is asked for, and it does not depend on x
        x = grad.new_zeros(*grad.shape[:-1], weight.shape[1], requires_grad=True)
    y = _reflected(x, weight, rows)
    inputs = [x if needs[2] else None, *(r if need else None for r, need in zip(rows, needs[7:], strict=True))]
    wanted = [each for each in inputs if each is not None]
    found = iter(torch.autograd.grad(y, wanted, grad.reshape(y.shape), create_graph=True))
    grad_x, *grad_rows = (None if each is None else next(found) for each in inputs)
    return None, None, grad_x, None, None, None, None, *grad_rows
