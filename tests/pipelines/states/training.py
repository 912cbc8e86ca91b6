"""Rules: gradients, with and without checkpointing, and steps along them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from pipelines.states.machine import DATA, PipelineStates, step
from pipelines.states.model import Component, Vectors, first_tensor
from pipelines.states.world import BLOCK, COMPONENTS, GRADIENTS, copied, in_dtype, inputs, part_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ether_diffusion as ether
from ether_diffusion.core.host import host_of
from ether_diffusion.core.switches import SwitchedError


class TrainingRules(PipelineStates):
    """Forward and backward, against autograd through the dense model."""

    def leaves(self, component: str) -> dict[str, Vectors]:
        part = self.parts[component]
        return {
            name: {
                path: {k: v.double().requires_grad_() for k, v in vectors.items()}
                for path, vectors in part.adapters[name].vectors.items()
            }
            for name in part.all_acting()
        }

    def expected_gradients(self, component: str, part_alone: bool, seed: int) -> dict[str, Tensor]:
        part, leaves = self.parts[component], self.leaves(component)
        given = part_inputs(component, seed) if part_alone else inputs(component, seed=seed)
        output = part.output(given, BLOCK[component] if part_alone else "", leaves)
        self.loss(output).backward()
        return {
            f"{name}.{path}.{key}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for name, places in leaves.items()
            for path, vectors in places.items()
            for key, leaf in vectors.items()
        }

    @staticmethod
    def loss(output: Tensor) -> Tensor:
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return (output.double() * probe).sum() + output.double().square().mean()

    @contextmanager
    def checkpointing(self, component: str, mode: str) -> Iterator[None]:
        """The model's own gradient checkpointing; ``mode`` is "", "reentrant" or "not reentrant"."""
        module = self.module(component)
        if not mode:
            yield
        elif component == "unet":
            module.enable_gradient_checkpointing(
                lambda inside, *args: checkpoint(inside.__call__, *args, use_reentrant=mode == "reentrant")
            )
            try:
                yield
            finally:
                module.disable_gradient_checkpointing()
        else:
            module.gradient_checkpointing_enable({"use_reentrant": False})
            module.train()
            try:
                yield
            finally:
                module.gradient_checkpointing_disable()
                module.eval()

    def forward_with_gradients(self, component: str, mode: str, part_alone: bool, seed: int) -> Tensor:
        part, module = self.parts[component], self.module(component)
        for name in part.adapters:
            self.adapter(component, name).requires_grad_().zero_grad()
        given = in_dtype(part_inputs(component, seed) if part_alone else inputs(component, seed=seed), part.dtype)
        first = next(iter(given.values()))
        if first.is_floating_point():
            first.requires_grad_()  # a reentrant checkpoint needs an input that does
        if not part_alone:
            return first_tensor(module(**given))
        block = module.get_submodule(BLOCK[component])
        if not mode:
            return first_tensor(block(**given))
        names, values = list(given), list(given.values())

        def call(*tensors: Tensor) -> Tensor:
            return first_tensor(block(**dict(zip(names, tensors, strict=True))))

        found: Tensor = checkpoint(call, *values, use_reentrant=mode == "reentrant")
        return found

    def found_gradients(self, component: str) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": torch.zeros_like(p) if p.grad is None else p.grad
            for name in self.parts[component].all_acting()
            for key, p in self.adapter(component, name).named_parameters()
        }

    def trainable(self) -> list[str]:
        return [
            name
            for name, part in self.parts.items()
            if part.all_acting() and self.quiet(name) and part.dtype in GRADIENTS and not part.offload.endswith("disk")
        ]

    @step(
        lambda self: self.trainable(),
        data=DATA,
        mode=st.sampled_from(("", "reentrant", "not reentrant")),
        part_alone=st.booleans(),
        updates=st.booleans(),
    )
    def gradients(self, data: st.DataObject, mode: str, part_alone: bool, updates: bool) -> None:
        """Forward and backward, and in half of the cases a step of gradient descent."""
        component, number = data.draw(st.sampled_from(self.trainable())), data.draw(st.integers(0, 9))
        part = self.parts[component]
        with self.checkpointing(component, "" if part_alone else mode):
            self.loss(self.forward_with_gradients(component, mode, part_alone, number)).backward()
        expected, found = self.expected_gradients(component, part_alone, number), self.found_gradients(component)
        self.check_gradients(part, found, expected)
        for name in part.all_acting() if updates else ():
            adapter = self.adapter(component, name)
            largest = max(p.grad.abs().max() for p in adapter.parameters() if p.grad is not None) + 1e-12
            with torch.no_grad():
                for parameter in adapter.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.05 * parameter.grad / largest)
            after = copied(adapter)
            for path, vectors in part.adapters[name].vectors.items():
                for key, value in vectors.items():
                    stepped = value - 0.05 * expected[f"{name}.{path}.{key}"] / largest
                    assert (stepped - after[path][key]).abs().max() < 1e-4
            part.adapters[name].vectors = after

    def check_gradients(self, part: Component, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        assert found.keys() == expected.keys()
        largest = max(value.abs().max() for value in expected.values()).item()
        worst = max((found[key] - value).abs().max() for key, value in expected.items()).item()
        assert worst <= GRADIENTS[part.dtype] * max(largest, 1e-3), f"gradients are off by {worst / largest:.2e}"

    @step(
        lambda self: "unet" in self.trainable() and not self.parts["unet"].offload and not self.any_fused(),
        data=DATA,
        mode=st.sampled_from(("reentrant", "not reentrant")),
    )
    def switch_before_the_backward(self, data: st.DataObject, mode: str) -> None:
        """Wrong gradients never: the backward is right where the same acts again, and an error where it does not."""
        part = self.parts["unet"]
        expected = self.expected_gradients("unet", False, 0)
        acting = list(part.all_acting())
        with self.checkpointing("unet", mode):
            loss = self.loss(self.forward_with_gradients("unet", mode, False, 0))
            ether.disable(self.pipe)
            again = data.draw(st.booleans())
            enabled = {name: each.enabled for name, each in self.parts.items()}
            if again:
                for name in COMPONENTS:
                    if enabled[name] and (host := host_of(self.module(name))):
                        host.enable()
                loss.backward()
            else:
                with pytest.raises(SwitchedError, match="adapters were switched between the forward and the backward"):
                    loss.backward()
                for name in COMPONENTS:
                    if enabled[name] and (host := host_of(self.module(name))):
                        host.enable()
        assert acting == list(part.all_acting())
        if again:
            self.check_gradients(part, self.found_gradients("unet"), expected)
