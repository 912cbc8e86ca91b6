"""The hooks on one projection: they apply its plan, or nothing. What a call needs lives in that call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ether_diffusion.core.buffers import can_be_buffered, fill, rank_of, state_of
from ether_diffusion.core.functional import Rows, is_half, matmul_dtype, row_update
from ether_diffusion.core.fused import FusedWeight
from ether_diffusion.core.low_rank import Factors, add_low_rank, low_rank_factors, plain_add_low_rank
from ether_diffusion.core.methods import Method, Reflection, Sides
from ether_diffusion.core.plan import Mixture, Off, PerSample, Plan
from ether_diffusion.core.rows import Slot, in_forward, own_rows, rows_of
from ether_diffusion.core.sides import reflect_input, reflect_output
from ether_diffusion.core.switches import SwitchedError
from ether_diffusion.core.weights import (
    bias_of,
    frozen_weight,
    image,
    is_plain,
    keeps_output,
    many_tokens,
)
from ether_diffusion.private import (
    alone,
    in_function_transform,
    others_see_output,
    run_while_tracing,
    same_id,
    saves_through_hooks,
)

GENERATIONS = 128
"""Generations are saved modulo this number, which every dtype that saved tensors may be packed in holds exactly."""


class PartOf(Protocol):
    """What a projection knows of the adapters of its model."""

    def check_part(self, projection: Projection) -> None:
        """Raise what keeps the projection from being called alone, without a forward of the whole model."""

    def fill_buffers(self) -> None:
        """Have the buffers of all projections there, so that the compiled code of one block fits the others."""


class Projection:
    """All adapters on one frozen projection.

    Forward hooks run around ``forward``, so they stack with anything that replaces it (Accelerate's offloading) and
    with any attention processor. A layer that owns the projection needs none: it calls :meth:`run`. Every plan costs
    one matmul of the projection, as the base does, and thin products beside it; a Naive adapter in a mixture with an
    output side costs one more.

    Args:
        path: canonical path in the model.
        module: the projection.
        host: the adapters of the model.
        hooked: whether forward hooks apply the plan; if not, whoever owns the projection calls :meth:`run`.

    Attributes:
        path: canonical path in the model.
        module: the projection.
        methods: of the adapters that are here, by name.
        plan: what acts now.
        fused: what is folded into the weight.
        buffered: whether compiled code without gradients may read :attr:`buffers` in place of the plan.
        buffers: the plan's update as thin factors, in tensors that stay when the plan changes: it is no guard then.
    """

    def __init__(self, path: str, module: nn.Module, host: PartOf | None = None, hooked: bool = True) -> None:
        self.path = path
        self.module = module
        self.methods: dict[str, Method] = {}
        self.plan: Plan = Off()
        self.fused: FusedWeight | None = None
        self.buffered = False
        self.buffers: Factors | None = None
        self._seen: object = None
        self._rank = 0
        self._host = host
        self._handles: list[Any] = []
        self._hooks = 1 if hooked else 0
        if hooked:
            self.hook(module)

    def put(self, name: str, method: Method) -> None:
        """Have an adapter's method here."""
        self.methods[name] = method
        self._rank = max(self._rank, rank_of(method))

    def hook(self, module: nn.Module) -> None:
        """Put the hooks on a module, which takes the place of the one before."""
        self.remove()
        self.module = module
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        for handle in self._handles:
            same_id(handle)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @property
    def slot(self) -> tuple[Slot, ...]:
        """What the plan needs rows of."""
        if isinstance(self.plan, PerSample):
            return (self.plan.methods,)
        return self.plan.reflections if isinstance(self.plan, Mixture) else ()

    def fuse(self) -> None:
        """Fold the plan into the weight; see :class:`FusedWeight`."""
        if isinstance(self.plan, Mixture):
            self.fused = FusedWeight.fold(self.module, self.plan)

    def unfuse(self) -> None:
        """Put the base weight back, where something was folded into it."""
        if self.fused is not None:
            self.fused.restore(self.module)
            self.fused = None

    def run(self, plan: Plan, *args: Any, **kwargs: Any) -> Tensor:
        """The output of a projection without hooks, under a plan for this call alone.

        Args:
            plan: what acts; nothing is kept of it when the call has ended.
            args: of the projection: its input (..., in_features), by position or by name.
            kwargs: likewise.

        Returns:
            (..., out_features).
        """
        module = self.module
        if torch.compiler.is_compiling() and plan is self.plan and self._reads_buffers(module):
            return self._from_buffers(given_input(args, kwargs), module(*args, **kwargs))
        call, changed = self._begin(plan, module, given_input(args, kwargs))
        if changed is not None:
            args, kwargs = with_input(args, kwargs, changed)
        output: Tensor = module(*args, **kwargs)
        moved = self._finish(call, module, given_input(args, kwargs), output)
        return output if moved is None else moved

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Transform the input, where that is the way of the plan."""
        if torch.compiler.is_compiling() and self._reads_buffers(module):
            return None
        call, changed = self._begin(self.plan, module, given_input(args, kwargs))
        _remember(self, call)
        return None if changed is None else with_input(args, kwargs, changed)

    def _begin(self, plan: Plan, module: nn.Module, x: Tensor) -> tuple[Call, Tensor | None]:
        """What a call decides before the projection, and the transformed input, where that is the way of the plan."""
        call, changed = Call(plan), None
        if not (isinstance(plan, Off) or self._host is None or torch.compiler.is_compiling() or in_forward(self._host)):
            self._host.check_part(self)
        if isinstance(plan, Off):
            pass
        elif isinstance(plan, Mixture) and not plan.as_sides:
            changed = None if plan.two_sided else self._input_mixture(plan, x, module)
        else:
            x = _for_matmul(x)
            sides = self.sides(plan, x, module)
            weight = frozen_weight(module, x, sides)
            if weight is not None and many_tokens(x, weight, plan):
                call = Call(plan, weight, sides)
            elif weight is not None and alone(module, self._hooks):
                changed, coefficients = reflect_input(x, sides[0])
                call = Call(plan, weight, sides, x, coefficients)
            else:
                changed = row_update(x, sides[0])
        return call, changed

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | None
    ) -> Tensor | None:
        """Add what is left to do to the output; None is that of a call that has failed."""
        call = _remembered(self)
        if output is None:
            return None
        x = given_input(args, kwargs)
        if torch.compiler.is_compiling() and self._reads_buffers(module):
            return self._from_buffers(x, output)
        return self._finish(call or self._compiled(module, x), module, x, output)

    def _from_buffers(self, x: Tensor, output: Tensor) -> Tensor:
        """The output moved by what the buffers hold, in code that is being compiled."""
        self.fill_all_buffers()
        assert self.buffers is not None
        return plain_add_low_rank(output, _for_matmul(x), Factors(*(each.to(output.dtype) for each in self.buffers)))

    def _finish(self, call: Call, module: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
        """The output with what the call has left to do; None where it stays as it is."""
        plan = call.plan
        if isinstance(plan, Off):
            return None
        changed = self._changed(plan, call, module, x, output)
        checked = output if changed is None else changed
        if not torch.compiler.is_compiling() and saves_through_hooks() and checked.requires_grad:
            if changed is None or others_see_output(module, self._hooks):
                checked = checked.clone()
            guarded: Tensor = _Checked.apply(checked, torch.tensor(plan.generation % GENERATIONS), self.path)
            return guarded
        return changed

    def _reads_buffers(self, module: nn.Module) -> bool:
        """Whether code that is being compiled is to read the buffers: without gradients, of vectors that stay."""
        return self.buffered and not torch.is_grad_enabled() and is_plain(module)

    def set_buffered(self) -> None:
        """Say anew whether compiled code may read the buffers, and write the plan into them where it does."""
        self.buffered = can_be_buffered(self.module, self.plan)
        if self.buffers is not None and self.buffered:
            self.fill_buffers()

    def fill_buffers(self) -> None:
        """Write the plan's update into the buffers."""
        self.buffers = fill(self.buffers, self.module, self.plan, self._rank)
        self._seen = state_of(self.module, self.plan)

    def fill_all_buffers(self) -> None:
        """Have all buffers of the model there, these anew; a compiler runs this while it traces, and not later."""
        self.fill_buffers()
        if self._host is not None:
            self._host.fill_buffers()

    run_while_tracing(fill_all_buffers)

    def refresh_buffers(self) -> None:
        """Write them again where vectors or the weight have been written to since."""
        if self.buffers is not None and self.buffered and self._seen != state_of(self.module, self.plan):
            self.fill_buffers()

    def _compiled(self, module: nn.Module, x: Tensor) -> Call:
        """A compiler, which sees both hooks at once, decides again what the first one has decided."""
        plan = self.plan
        if isinstance(plan, Off) or (isinstance(plan, Mixture) and not plan.as_sides):
            return Call(plan)
        x = _for_matmul(x)
        sides = self.sides(plan, x, module)
        weight = frozen_weight(module, x, sides)
        return Call(plan, weight if weight is not None and many_tokens(x, weight, plan) else None, sides)

    def _changed(
        self, plan: Mixture | PerSample, call: Call, module: nn.Module, x: Tensor, output: Tensor
    ) -> Tensor | None:
        if isinstance(plan, Mixture) and not plan.as_sides:
            return self._mixture(plan, module, x, output) if plan.two_sided else None
        if call.x is not None and call.weight is not None and call.coefficients is not None:
            bias: Tensor | None = module.bias  # type: ignore[assignment]
            return reflect_output(
                output, x, call.x, call.coefficients, call.weight, bias, call.sides, keeps_output(output)
            )
        if call.weight is not None:
            return self._moved(output, _for_matmul(x), call.weight, low_rank_factors(call.weight, call.sides))
        if plan.two_sided:
            return row_update(output, self.sides(plan, output, module)[1], bias_of(module, output))
        return None

    def _input_mixture(self, plan: Mixture, x: Tensor, module: nn.Module) -> Tensor:
        """x + Σ s E x of a plan with input sides alone, Naive's among them."""
        changed = x
        for method, strength in plan.parts:
            changed = changed + strength * self._on(method, x, module).input_delta(x)
        return changed

    def sides(self, plan: Mixture | PerSample, x: Tensor, module: nn.Module) -> Sides:
        """The rows of all sides of a plan that is a product of sides, for arithmetic with x."""
        if isinstance(plan, PerSample):
            mixed = self._rows(plan.methods, x, module)
            return tuple([plan.samples.choose(rows, x, self.path) for rows in mixed])
        if len(plan.parts) == 1 and plan.parts[0][1] == 1.0:
            return self._rows(plan.reflections[0], x, module)
        parts = [self._rows(method, x, module) for method in plan.reflections]
        strengths = [strength for _, strength in plan.parts]
        return tuple([scaled(rows, strengths) for rows in map(list, zip(*parts, strict=True))])

    def _rows(self, slot: Slot, x: Tensor, module: nn.Module) -> Sides:
        """The rows of a slot: those of the running forward, or its own."""
        sides = rows_of(self._host, slot)
        if sides is None or not _usable(sides[0].analysis, x):
            for method in slot if isinstance(slot, tuple) else (slot,):
                self._on(method, x, module)
            sides = own_rows(slot)
        if sides[0].analysis.dtype == x.dtype:
            return sides
        return tuple([rows.for_matmul(x.dtype) for rows in sides])

    def _mixture(self, plan: Mixture, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """W x + b + Σ s ΔW x for any parts, without a second matmul but Naive's."""
        x = _for_matmul(x)
        of_parts = [
            (method, strength, self._rows(method, x, module) if isinstance(method, Reflection) else ())
            for method, strength in plan.parts
        ]
        reflected = len(plan.reflections) == len(plan.parts)
        weight = frozen_weight(module, x, of_parts[0][2]) if reflected else None
        if weight is not None and (x.device.type != "cpu" or many_tokens(x, weight, plan)):
            found = [low_rank_factors(weight, sides) for _, _, sides in of_parts]
            strengths = [strength for _, strength, _ in of_parts]
            down = torch.cat([each.down for each in found], -2)
            up = torch.cat([s * each.up for s, each in zip(strengths, found, strict=True)], -2)
            return self._moved(output, x, weight, Factors(down, up))
        bias, total = bias_of(module, output), output
        base = output if bias is None else output - bias.to(output.dtype)
        for method, strength, sides in of_parts:
            if not sides:
                moved = image(module, self._on(method, x, module).input_delta(x), bias)
            else:
                analysis, synthesis = sides[0]
                product = _thin_image(module, synthesis, x, bias)
                thin = F.linear(x.to(analysis.dtype), analysis)
                moved = F.linear(thin, product.mT.to(analysis.dtype)).to(output.dtype)
                if len(sides) == 2:
                    moved = moved + row_update(base + moved, sides[1], keep=False)
            total = total + strength * moved
        return total

    def _moved(self, output: Tensor, x: Tensor, weight: Tensor, factors: Factors) -> Tensor:
        """The output moved by x downᵀ up; in place where it is the projection's own and nobody else has seen it."""
        seen = others_see_output(self.module, self._hooks)
        if torch.compiler.is_compiling() or in_function_transform() or seen or output.dtype != x.dtype:
            return plain_add_low_rank(output, x, factors)
        return add_low_rank(output.detach(), x, weight, factors)

    def _on(self, method: Method, x: Tensor, module: nn.Module) -> Method:
        """The method on the device of ``x``: it follows the model wherever the pipeline moves it."""
        parameter = next(method.parameters())
        return method if parameter.device == x.device else method.to(x.device)


def fill_missing(projections: Iterable[Projection]) -> None:
    """Make the buffers that compiled code may read and that are not there yet."""
    for projection in projections:
        if projection.buffered and projection.buffers is None:
            projection.fill_buffers()


class Call(NamedTuple):
    """What the first hook of a call has decided and made, for the second.

    Attributes:
        plan: what acts.
        weight: of a projection that autograd need not trace; without ``x`` the update is added as a low-rank product.
        sides: the rows for it.
        x: the input, where it was reflected without a graph.
        coefficients: of :func:`reflect_input`.
    """

    plan: Plan
    weight: Tensor | None = None
    sides: Sides = ()
    x: Tensor | None = None
    coefficients: Tensor | None = None


_CALLS = threading.local()
"""What each projection's running call has decided; both hooks of a call run in one thread."""


def _remember(projection: Projection, call: Call) -> None:
    """Keep what a call has decided until its second hook."""
    if not torch.compiler.is_compiling():
        if not hasattr(_CALLS, "running"):
            _CALLS.running = weakref.WeakKeyDictionary()
        _CALLS.running[projection] = call


def _remembered(projection: Projection) -> Call | None:
    """What the call has decided, which is forgotten; None where it is compiled."""
    if torch.compiler.is_compiling():
        return None
    found: Call | None = getattr(_CALLS, "running", {}).pop(projection, None)
    return found


class _Checked(torch.autograd.Function):
    """The output itself; its backward fails where the part was computed again under another plan.

    The generation is saved as a tensor, so within a checkpoint it is the one of the recomputation, and kept as a
    number, which is the one of the forward.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, generation: Tensor, path: str) -> Tensor:
        ctx.save_for_backward(generation)
        ctx.generation, ctx.path = int(generation), path
        return output.data  # no view, so that what follows may change it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (generation,) = ctx.saved_tensors
        if int(generation) != ctx.generation:
            raise SwitchedError(ctx.path)
        return gradients[0], None, None


def _usable(rows: Tensor, x: Tensor) -> bool:
    """Whether rows can be used for x: rounded to another half precision, they would be rounded twice."""
    return rows.device == x.device and (rows.dtype == x.dtype or rows.dtype == torch.float32)


def given_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a projection, given by position or by name."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another input."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}


def _for_matmul(x: Tensor) -> Tensor:
    """X in the half precision that the projection itself would cast it to under autocast."""
    dtype = matmul_dtype(x)
    return x.to(dtype) if x.dtype != dtype and is_half(dtype) else x


def scaled(parts: list[Rows], strengths: list[float]) -> Rows:
    """The rows of Σ s E."""
    synthesis = [s * rows.synthesis for rows, s in zip(parts, strengths, strict=True)]
    return Rows(torch.cat([rows.analysis for rows in parts], -2), torch.cat(synthesis, -2))


def _thin_image(module: nn.Module, rows: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Rows Wᵀ, (k, out_features): W applied to few rows, whatever W is stored in."""
    if is_plain(module) and isinstance(module.weight, Tensor) and module.weight.device == x.device:
        dtype = torch.promote_types(rows.dtype, module.weight.dtype)
        return rows.to(dtype) @ module.weight.mT.to(dtype)
    return image(module, rows.to(x.dtype), bias)
