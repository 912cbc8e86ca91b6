"""The hooks on one projection: they apply whatever adapters are active there, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion.core.functional import is_half, matmul_dtype, symmetric_update
from ether_diffusion.core.low_rank import add_low_rank, low_rank_factors, plain_add_low_rank
from ether_diffusion.core.methods import Method, Reflection, Sides
from ether_diffusion.core.per_sample import PerSample
from ether_diffusion.core.rows import SharedRows, Slot, stacked_sides

TOKENS_TO_FEATURES = 0.5
"""From half as many tokens as output features on, four passes over the weight cost less than four over the tokens.

That is so on a CPU. On other devices launches count, of which the weight's way takes more.
"""


class Injection:
    """All adapters on one frozen projection.

    Forward hooks run around ``forward``, so they stack with anything that replaces it (Accelerate's offloading) and
    with any attention processor. A single adapter at strength 1, one adapter for each sample, and input-sided ones in
    any mixture, cost one matmul as the base does; other mixtures cost one more per adapter, W + Σ s ΔW being no product
    of transforms.
    """

    def __init__(self, path: str, module: nn.Module, shared: SharedRows | None = None) -> None:
        self.path = path
        self.module = module
        self.methods: dict[str, Method] = {}
        self.active: list[tuple[Method, float]] = []
        self.slot: Slot | None = None
        self.per_sample: PerSample | None = None
        self.base_weight: Tensor | None = None
        self._shared = shared or SharedRows()
        self._pending: tuple[Tensor, Sides, Tensor | None] | None = None
        self._handles = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def activate(self, strengths: Mapping[str, float]) -> None:
        """Let the adapters of these names that are here act: W + Σ s ΔW."""
        here = [(self.methods[name], s) for name, s in strengths.items() if s != 0.0 and name in self.methods]
        self.active, self.per_sample, self.slot = here, None, None
        if len(here) == 1 and here[0][1] == 1.0 and isinstance(here[0][0], Reflection):
            self.slot = here[0][0]

    def activate_per_sample(self, per_sample: PerSample) -> None:
        """Let each sample of a batch have its own adapter."""
        methods = [self.methods[name] for name in per_sample.adapters if name in self.methods]  # all of them or none
        self.active, self.per_sample, self.slot = [], None, None
        if methods:
            self.per_sample = per_sample
            self.slot = tuple(method for method in methods if isinstance(method, Reflection))

    def fuse(self) -> None:
        """Add the active Σ s ΔW to the weight in place; the base weight is kept for :meth:`unfuse`."""
        weight = _weight(self.module)
        delta = sum((s * m.to(weight.device).delta_weight(weight) for m, s in self.active), torch.zeros(()))
        self.base_weight = weight.detach().clone()
        with torch.no_grad():
            weight.copy_((weight.float() + delta.to(weight.device)).to(weight.dtype))

    def unfuse(self) -> None:
        """Put the base weight back, bit for bit."""
        if self.base_weight is not None:
            with torch.no_grad():
                _weight(self.module).copy_(self.base_weight)
            self.base_weight = None

    @property
    def _one_matmul(self) -> bool:
        return not any(method.two_sided for method, _ in self.active)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._pending = None
        if self.base_weight is not None:
            return None
        if self.slot is not None:
            x: Tensor = args[0]
            dtype = matmul_dtype(x)
            if x.dtype != dtype and is_half(dtype):
                x = x.to(dtype)  # as the projection itself would under autocast
            sides = self._sides(self.slot, x)
            weight = self._cheap_weight(x, sides)
            self._pending = x, sides, weight
            if weight is None:
                return (symmetric_update(x, sides[0]), *args[1:])
            return None if torch.compiler.is_compiling() else (x.detach(), *args[1:])
        if not self.active or not self._one_matmul:
            return None
        x = args[0]
        for method, strength in self.active:
            delta = _on(method, args[0]).input_delta(args[0])
            x = x + (delta if strength == 1.0 else strength * delta)
        return (x, *args[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._pending is not None:
            (x, sides, weight), self._pending = self._pending, None
            if weight is not None:
                factors = low_rank_factors(weight, sides)
                if torch.compiler.is_compiling():
                    return plain_add_low_rank(output, x, factors)
                return add_low_rank(output, x, weight, factors)
            return symmetric_update(output, sides[1], self._bias(output)) if len(sides) == 2 else None
        if not self.active or self.base_weight is not None or self._one_matmul:
            return None
        return self._mixture(args[0], output)

    def _sides(self, slot: Slot, x: Tensor) -> Sides:
        """The rows of this projection's sides, those of each sample if samples differ, for arithmetic with x."""
        sides = self._shared.of(slot)
        usable = (torch.float32, x.dtype)  # rounded to another half precision, they would be rounded twice
        if sides is None or sides[0].analysis.device != x.device or sides[0].analysis.dtype not in usable:
            sides = self._own(slot, x)
        sides = tuple([rows.for_matmul(x.dtype) for rows in sides])
        if self.per_sample is None:
            return sides
        return tuple([self.per_sample.choose(rows, x, self.path) for rows in sides])

    def _own(self, slot: Slot, x: Tensor) -> Sides:
        if isinstance(slot, Reflection):
            _on(slot, x)
            return slot.sides()
        for method in slot:
            _on(method, x)
        return stacked_sides(slot)

    def _cheap_weight(self, x: Tensor, sides: Sides) -> Tensor | None:
        """The weight, where it can be read and is small for so many tokens; None where they are to be transformed."""
        module = self.module
        if x.device.type != "cpu":
            return None
        if type(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
            return None  # quantised, or an offloading hook has replaced it
        weight = plain_weight(module)
        if weight is None or weight.device != x.device or not x.dtype == weight.dtype == sides[0].analysis.dtype:
            return None
        trained = weight.requires_grad or (module.bias is not None and module.bias.requires_grad)
        if trained and torch.is_grad_enabled():
            return None  # their gradients are autograd's
        samples = max(1, sides[0].analysis.shape[:-2].numel())
        return weight if x.numel() >= TOKENS_TO_FEATURES * samples * weight.numel() else None

    def _mixture(self, x: Tensor, base: Tensor) -> Tensor:
        """W x + b + Σ s (W' x - W x), one matmul for each W'."""
        output = base
        for method, strength in self.active:
            y = self.module.forward(x + _on(method, x).input_delta(x))
            if method.two_sided:
                y = y + method.output_delta(y, self._bias(y))
            output = output + strength * (y - base)
        return output

    def _bias(self, like: Tensor) -> Tensor | None:
        """The projection's bias; where an offloading hook or a quantised layer hides it, the image of zero."""
        bias = getattr(self.module, "bias", None)
        if bias is None or (isinstance(bias, Tensor) and bias.device == like.device):
            return bias
        zero = like.new_zeros(1, int(self.module.in_features))  # type: ignore[arg-type]
        image: Tensor = self.module.forward(zero)
        return image[0]


def _on(method: Method, x: Tensor) -> Method:
    """The method on the device of ``x``: it follows the model wherever the pipeline moves it."""
    parameter = next(method.parameters())
    return method if parameter.device == x.device else method.to(x.device)


def plain_weight(module: nn.Module) -> Tensor | None:
    """The (out_features, in_features) weight of a projection; None where it is quantised (8 bits and fewer count)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor:  # a subclass holds packed numbers
        return None
    whole = weight.is_floating_point() and weight.element_size() > 1
    return weight if whole and list(weight.shape) == [module.out_features, module.in_features] else None


def _weight(module: nn.Module) -> Tensor:
    """The weight of a projection that can be changed in place.

    Raises:
        ValueError: it is quantised, or an offloading hook keeps it elsewhere.
    """
    weight = plain_weight(module)
    if weight is None:
        raise ValueError(f"cannot fuse into {type(module).__name__}: its weight is quantised; use the adapter unfused")
    if weight.is_meta:
        raise ValueError("cannot fuse into offloaded weights: fuse before enabling sequential CPU offload")
    return weight
