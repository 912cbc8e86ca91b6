"""The hooks on one projection: they apply whatever adapters are active there, or nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion.methods import Method


class Injection:
    """All adapters on one frozen projection.

    Forward hooks run around ``forward``, so they stack with anything that replaces it (Accelerate's offloading) and
    with any attention processor. A single adapter at strength 1, and input-sided ones in any mixture, cost one
    matmul as the base does; other mixtures cost one more per adapter, W + Σ s ΔW being no product of transforms.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        self.module = module
        self.methods: dict[str, Method] = {}
        self.active: list[tuple[Method, float]] = []
        self.base_weight: Tensor | None = None
        self._handles = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

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
        two_sided = [strength for method, strength in self.active if method.two_sided]
        return not two_sided or (len(self.active) == 1 and two_sided == [1.0])

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.active or self.base_weight is not None or not self._one_matmul:
            return None
        x = args[0]
        if len(self.active) == 1 and self.active[0][1] == 1.0:
            return (_on(self.active[0][0], x).transform_input(x), *args[1:])
        for method, strength in self.active:
            delta = _on(method, args[0]).input_delta(args[0])
            x = x + (delta if strength == 1.0 else strength * delta)
        return (x, *args[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.active or self.base_weight is not None:
            return None
        if not self._one_matmul:
            return self._mixture(args[0], output)
        method = self.active[0][0]
        return method.transform_output(output, self._bias(output)) if method.two_sided else None

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
