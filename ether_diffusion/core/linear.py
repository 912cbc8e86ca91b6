"""The hooks on one projection: they apply its plan, or nothing. What a call needs lives in that call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ether_diffusion.core.functional import Rows, is_half, matmul_dtype, symmetric_update
from ether_diffusion.core.low_rank import Factors, add_low_rank, low_rank_factors, plain_add_low_rank
from ether_diffusion.core.methods import Method, Reflection, Sides
from ether_diffusion.core.plan import Mixture, Off, PerSample, Plan
from ether_diffusion.core.rows import Slot, own_rows, rows_of
from ether_diffusion.core.torch_private import in_function_transform, others_see_output, saves_through_hooks
from ether_diffusion.core.weights import (
    bias_of,
    cheap_weight,
    checksum,
    image,
    is_plain,
    same_but_for_rounding,
    writable_weight,
)

GENERATIONS = 128
"""Generations are saved modulo this number, which every dtype that saved tensors may be packed in holds exactly."""


class SwitchedError(RuntimeError):
    """Adapters were switched between a forward and the backward that computes parts of it again."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"adapters were switched between the forward and the backward of {where}, which computes parts of the "
            "forward again (gradient checkpointing): call backward before you switch, or turn checkpointing off"
        )


class Projection:
    """All adapters on one frozen projection.

    Forward hooks run around ``forward``, so they stack with anything that replaces it (Accelerate's offloading) and
    with any attention processor. Every plan costs one matmul of the projection, as the base does, and thin products
    beside it; a Naive adapter in a mixture with an output side costs one more.

    Attributes:
        path: canonical path in the model.
        module: the projection.
        methods: of the adapters that are here, by name.
        plan: what acts now.
        base_weight: of the base while an adapter is fused into the weight, on the CPU.
    """

    def __init__(self, path: str, module: nn.Module, host: object = None) -> None:
        self.path = path
        self.module = module
        self.methods: dict[str, Method] = {}
        self.plan: Plan = Off()
        self.base_weight: Tensor | None = None
        self._written = 0
        self._host = host
        self._handles: list[Any] = []
        self.hook(module)

    def hook(self, module: nn.Module) -> None:
        """Put the hooks on a module, which takes the place of the one before."""
        self.remove()
        self.module = module
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

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
        """Add the plan's Σ s ΔW to the weight in place; the base weight is kept for :meth:`unfuse`.

        Raises:
            ValueError: the weight is quantised, sharded or offloaded.
        """
        if not isinstance(self.plan, Mixture):
            return
        weight = writable_weight(self.module, "fuse into")
        base, fused = weight.detach().to("cpu", copy=True), self._fused_weight(weight.detach(), self.plan)
        with torch.no_grad():
            weight.copy_(fused)
        self.base_weight, self._written = base, checksum(weight)

    def check_unfuse(self, plan: Plan, wrapped: bool, force: bool = False) -> None:
        """Raise what :meth:`unfuse` would.

        Args:
            plan: what was fused.
            wrapped: whether PEFT has a layer around the projection, which may have merged and unmerged an update.
            force: whether other changes of the weight are to be dropped.

        Raises:
            ValueError: the weight is offloaded.
            RuntimeError: something else has changed the weight.
        """
        if self.base_weight is None:
            return
        weight = writable_weight(self.module, "unfuse")
        if force or checksum(weight) == self._written:
            return
        rounded = wrapped or weight.dtype != self.base_weight.dtype  # by PEFT's merging and unmerging, or by a cast
        base = self.base_weight.to(weight.device, weight.dtype)
        expected = self._fused_weight(base, plan) if isinstance(plan, Mixture) else base
        if not rounded or not same_but_for_rounding(weight.detach(), expected):
            raise RuntimeError(
                f"cannot unfuse: the weight of {self.path} was changed since the adapter was fused into it, perhaps by "
                "a LoRA: take that off, or call ether.unfuse(pipe, force=True), which restores the base without it"
            )

    def unfuse(self) -> None:
        """Put the base weight back, bit for bit; :meth:`check_unfuse` says whether that is right."""
        if self.base_weight is not None:
            weight = writable_weight(self.module, "unfuse")
            with torch.no_grad():
                weight.copy_(self.base_weight)
            self.base_weight = None

    @torch.no_grad()
    def _fused_weight(self, base: Tensor, plan: Mixture) -> Tensor:
        delta = sum(
            (s * m.to(base.device).delta_weight(base) for m, s in plan.parts), torch.zeros((), device=base.device)
        )
        return (base.float() + delta).to(base.dtype)

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Transform the input, where that is the way of the plan."""
        plan, x = self.plan, given_input(args, kwargs)
        _decide(self, plan, None)
        if isinstance(plan, Off):
            return None
        if isinstance(plan, Mixture) and not plan.as_sides:
            if plan.two_sided:
                return None
            changed = x
            for method, strength in plan.parts:
                changed = changed + strength * self._on(method, x, module).input_delta(x)
            return with_input(args, kwargs, changed)
        x = _for_matmul(x)
        weight = cheap_weight(module, x, plan)
        _decide(self, plan, weight)
        if weight is not None:
            return None
        return with_input(args, kwargs, symmetric_update(x, self._side(plan, 0, x, module)))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """Add what is left to do to the output."""
        x = given_input(args, kwargs)
        plan, weight = _decided(self, module, x)
        if isinstance(plan, Off):
            return None
        changed = self._changed(plan, weight, module, x, output)
        checked = output if changed is None else changed
        if not torch.compiler.is_compiling() and saves_through_hooks() and checked.requires_grad:
            if changed is None or others_see_output(module):
                checked = checked.clone()
            guarded: Tensor = _Checked.apply(checked, torch.tensor(plan.generation % GENERATIONS), self.path)
            return guarded
        return changed

    def _changed(
        self, plan: Mixture | PerSample, weight: Tensor | None, module: nn.Module, x: Tensor, output: Tensor
    ) -> Tensor | None:
        if isinstance(plan, Mixture) and not plan.as_sides:
            return self._mixture(plan, module, x, output) if plan.two_sided else None
        x = _for_matmul(x)
        if weight is None:
            if not plan.two_sided:
                return None
            return symmetric_update(output, self._side(plan, 1, output, module), bias_of(module, output))
        sides = tuple([self._side(plan, side, x, module) for side in range(1 + plan.two_sided)])
        return _moved(module, output, x, weight, low_rank_factors(weight, sides))

    def _side(self, plan: Mixture | PerSample, side: int, x: Tensor, module: nn.Module) -> Rows:
        """The rows of one side of a plan that is a product of sides, for arithmetic with x."""
        if isinstance(plan, PerSample):
            return plan.samples.choose(self._rows(plan.methods, side, x, module), x, self.path)
        parts = [self._rows(method, side, x, module) for method in plan.reflections]
        strengths = [strength for _, strength in plan.parts]
        if len(parts) == 1 and strengths[0] == 1.0:
            return parts[0]
        return scaled(parts, strengths)

    def _rows(self, slot: Slot, side: int, x: Tensor, module: nn.Module) -> Rows:
        """The rows of one side of a slot: those of the running forward, or its own."""
        sides = rows_of(self._host, slot)
        rows = None if sides is None else sides[side]
        usable = (torch.float32, x.dtype)  # rounded to another half precision, they would be rounded twice
        if rows is None or rows.analysis.device != x.device or rows.analysis.dtype not in usable:
            for method in slot if isinstance(slot, tuple) else (slot,):
                self._on(method, x, module)
            rows = own_rows(slot, side)
        return rows.for_matmul(x.dtype)

    def _sides(self, method: Reflection, x: Tensor, module: nn.Module) -> Sides:
        """The rows of all sides of a method."""
        return tuple([self._rows(method, side, x, module) for side in range(1 + method.two_sided)])

    def _mixture(self, plan: Mixture, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """W x + b + Σ s ΔW x for any parts, without a second matmul but Naive's."""
        x = _for_matmul(x)
        of_parts = [
            (method, strength, self._sides(method, x, module) if isinstance(method, Reflection) else ())
            for method, strength in plan.parts
        ]
        weight = cheap_weight(module, x, plan) if len(plan.reflections) == len(plan.parts) else None
        if weight is not None:
            found = [low_rank_factors(weight, sides) for _, _, sides in of_parts]
            strengths = [strength for _, strength, _ in of_parts]
            down = torch.cat([each.down for each in found], -2)
            up = torch.cat([s * each.up for s, each in zip(strengths, found, strict=True)], -2)
            return _moved(module, output, x, weight, Factors(down, up))
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
                    moved = moved + symmetric_update(base + moved, sides[1], keep=False)
            total = total + strength * moved
        return total

    def _on(self, method: Method, x: Tensor, module: nn.Module) -> Method:
        """The method on the device of ``x``: it follows the model wherever the pipeline moves it."""
        parameter = next(method.parameters())
        return method if parameter.device == x.device else method.to(x.device)


_CALLS = threading.local()
"""What each projection's running call has decided; both hooks of a call run in one thread."""


def _decide(projection: Projection, plan: Plan, weight: Tensor | None) -> None:
    """Remember the plan of a call, and the weight if its update is to be applied as a product of low rank."""
    if not torch.compiler.is_compiling():
        if not hasattr(_CALLS, "decided"):
            _CALLS.decided = weakref.WeakKeyDictionary()
        _CALLS.decided[projection] = (plan, weight)


def _decided(projection: Projection, module: nn.Module, x: Tensor) -> tuple[Plan, Tensor | None]:
    """What the call has decided; a compiler, which sees both hooks at once, decides again."""
    if not torch.compiler.is_compiling() and projection in (known := getattr(_CALLS, "decided", {})):
        plan, weight = known.pop(projection)
        return plan, weight
    plan = projection.plan
    if isinstance(plan, Off) or (isinstance(plan, Mixture) and not plan.as_sides):
        return plan, None
    return plan, cheap_weight(module, _for_matmul(x), plan)


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
    """The rows of Σ s E: each E's scaled by √|s|, so that they stay those of a symmetric update."""
    analysis = [abs(s) ** 0.5 * rows.analysis for rows, s in zip(parts, strengths, strict=True)]
    signed = [abs(s) ** 0.5 * (1 if s > 0 else -1) * rows.synthesis for rows, s in zip(parts, strengths, strict=True)]
    return Rows(torch.cat(analysis, -2), torch.cat(signed, -2))


def _moved(module: nn.Module, output: Tensor, x: Tensor, weight: Tensor, factors: Factors) -> Tensor:
    """The output moved by x downᵀ up; in place where the output is the projection's own and nobody else has seen it."""
    if torch.compiler.is_compiling() or in_function_transform() or others_see_output(module) or output.dtype != x.dtype:
        return plain_add_low_rank(output, x, factors)
    return add_low_rank(output.detach(), x, weight, factors)


def _thin_image(module: nn.Module, rows: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Rows Wᵀ, (k, out_features): W applied to few rows, whatever W is stored in."""
    if is_plain(module) and isinstance(module.weight, Tensor) and module.weight.device == x.device:
        dtype = torch.promote_types(rows.dtype, module.weight.dtype)
        return rows.to(dtype) @ module.weight.mT.to(dtype)
    return image(module, rows.to(x.dtype), bias)
