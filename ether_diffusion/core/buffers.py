"""What compiled code reads of a plan: its update as thin factors, in tensors that stay when the plan changes.

A compiler traces through the hooks, and what they look at becomes a condition of the compiled code: a plan that changes
would make it trace again. Where no vector is trained and no gradient wanted, it is given the factors of W' - W instead,
as tensors of one shape. Switching adapters, setting strengths, turning them off writes other numbers into them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ether_diffusion.core.low_rank import Factors, low_rank_factors
from ether_diffusion.core.methods import Method, Reflection
from ether_diffusion.core.plan import Mixture, PerSample, Plan
from ether_diffusion.core.weights import plain_weight


def can_be_buffered(module: nn.Module, plan: Plan) -> bool:
    """Whether what acts on a projection has thin factors that stay: frozen reflections, and a weight to read."""
    weight = plain_weight(module)
    if weight is None or weight.is_meta or isinstance(plan, PerSample):
        return False
    methods = [method for method, _ in plan.parts] if isinstance(plan, Mixture) else []
    reflections = all(isinstance(method, Reflection) for method in methods)
    return reflections and not any(vector.requires_grad for method in methods for vector in method.parameters())


@torch.no_grad()
def fill(buffers: Factors | None, module: nn.Module, plan: Plan, rank: int) -> Factors:
    """Write the factors of a plan, padded with zeros: into the buffers, or into new ones where these do not fit.

    Args:
        buffers: what there is.
        module: the projection; :func:`can_be_buffered` has said that it can be.
        plan: what acts.
        rank: rows that there are at least.

    Returns:
        down (r, in_features) and up (r, out_features), in the dtype of the weight.
    """
    weight = plain_weight(module)
    assert weight is not None
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    downs, ups = [exact.new_zeros(0, weight.shape[1])], [exact.new_zeros(0, weight.shape[0])]
    for method, strength in plan.parts if isinstance(plan, Mixture) else ():
        assert isinstance(method, Reflection)
        down, up = low_rank_factors(exact, method.to(weight.device).sides())
        downs.append(down)
        ups.append(strength * up)
    values = [torch.cat(parts).to(weight.dtype) for parts in (downs, ups)]
    rank = max(rank, len(values[0]))
    fits = buffers is not None and len(buffers.down) >= rank
    if buffers is None or not fits or buffers.down.device != weight.device or buffers.down.dtype != weight.dtype:
        buffers = Factors(weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(rank, weight.shape[0]))
    for buffer, value in zip(buffers, values, strict=True):
        buffer.zero_()[: len(value)] = value
    return buffers


def state_of(module: nn.Module, plan: Plan) -> list[tuple[int, int]]:
    """Tells whether the weight or vectors that act have been written to, or moved."""
    methods = [method for method, _ in plan.parts] if isinstance(plan, Mixture) else []
    tensors: list[Tensor] = [vector for method in methods for vector in (*method.parameters(), *method.buffers())]
    if (weight := plain_weight(module)) is not None:
        tensors.append(weight)
    return [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors]


def rank_of(method: Method) -> int:
    """Of W' - W: the number of rows of all sides; 0 where it is not thin."""
    return method.rank if isinstance(method, Reflection) else 0
