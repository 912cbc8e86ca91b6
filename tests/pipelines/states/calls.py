"""Rules: calls of other kinds, from threads, of parts, compiled, failing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import strategies as st
from pipelines.states.machine import COMPONENT, DATA, step
from pipelines.states.model import BATCH, Refusal, first_tensor
from pipelines.states.training import TrainingRules
from pipelines.states.world import BLOCK, TOLERANCE, error_of, in_dtype, inputs, part_inputs

import ether_diffusion as ether
from ether_diffusion import EtherConfig


class CallRules(TrainingRules):
    """Calls that must not change anything."""

    @step(lambda self: not self.offloaded() and self.quiet("unet"))
    def two_threads(self) -> None:
        part = self.parts["unet"]
        unit = BATCH if part.per_sample is None else len(part.per_sample)
        batches = [(unit, 1), (2 * unit, 2), (unit, 3)]

        expected = {each: part.output(inputs("unet", *each)) for each in batches}

        def serve(order: int) -> list[float]:
            with torch.no_grad():
                return [error_of(self.run("unet", inputs("unet", *each)), expected[each]) for each in batches[::order]]

        with ThreadPoolExecutor(2) as pool:
            worst = max(max(errors) for errors in pool.map(serve, (1, -1)))
        assert worst <= TOLERANCE[part.dtype], f"two threads: the output is off by {worst:.2e}"

    @step(lambda self: True, component=COMPONENT, number=st.integers(0, 9))
    def a_part_alone(self, component: str, number: int) -> None:
        part = self.parts[component]
        if part.offload.endswith("disk"):
            return  # diffusers brings weights back from the disk when their whole group is called
        given = part_inputs(component, number)
        must, may = part.refusals(part=BLOCK[component])
        try:
            with torch.no_grad():
                block = self.module(component).get_submodule(BLOCK[component])
                found = first_tensor(block(**in_dtype(given, part.dtype)))
        except (RuntimeError, ValueError) as refused:
            if not any(refusal.fits(refused) for refusal in must + may):
                raise
            return
        assert not must, f"{component}: the part should have been refused: {must}"
        error = error_of(found, part.output(given, BLOCK[component]))
        assert error <= TOLERANCE[part.dtype], f"{component}: the part's output is off by {error:.2e}"

    @step(
        lambda self: True,
        data=DATA,
        component=COMPONENT,
        late=st.booleans(),
        trains=st.booleans(),
        mode=st.sampled_from(("", "reentrant", "not reentrant")),
    )
    def an_exception_inside(self, data: st.DataObject, component: str, late: bool, trains: bool, mode: str) -> None:
        """A hook on a projection raises; the invariant then finds all as it was.

        Its forward also puts away the weights that accelerate has left in memory. Known defect: before that,
        ``ether.fuse`` takes them for the model's own.
        """
        if not self.quiet(component) or self.parts[component].qkv_fused:
            return  # where q, k, v are fused, the projection may not be called
        path = data.draw(st.sampled_from(sorted(self.parts[component].stored)))
        module = self.module(component).get_submodule(path)

        def fail(*_: object) -> None:
            raise MemoryError(path)

        handle = module.register_forward_hook(fail) if late else module.register_forward_pre_hook(fail)
        try:
            with self.checkpointing(component, mode), torch.set_grad_enabled(trains), pytest.raises(MemoryError):
                self.forward_with_gradients(component, mode, False, 0)
        finally:
            handle.remove()

    @step(lambda self: self.compiles_left > 0 and not self.offloaded() and self.quiet("unet"), trains=st.booleans())
    def compiled_call(self, trains: bool) -> None:
        self.compiles_left -= 1
        if self.compiled is None:
            self.compiled = torch.compile(self.pipe.unet, backend="aot_eager")
        if trains and "unet" in self.trainable():
            for name in self.parts["unet"].adapters:
                self.adapter("unet", name).requires_grad_().zero_grad()
            self.loss(self.run("unet", module=self.compiled)).backward()
            expected = self.expected_gradients("unet", False, 0)
            self.check_gradients(self.parts["unet"], self.found_gradients("unet"), expected)
        else:
            self.compare("unet", self.compiled)

    @step(kind=st.integers(0, 6))
    def nonsense(self, kind: int) -> None:
        known = self.names()
        calls: list[tuple[Callable[[], object], type[Exception], str]] = [
            (lambda: ether.set_adapters(self.pipe, ["nobody"]), ValueError, "no adapter 'nobody' is loaded"),
            (lambda: ether.unload(self.pipe, "nobody"), ValueError, "no adapter 'nobody' is loaded"),
            (lambda: ether.load(self.pipe, self.folder / "nothing", "x"), FileNotFoundError, "nothing"),
            (lambda: ether.attach(self.pipe.unet, EtherConfig(n_blocks=5), "x"), ValueError, "does not divide"),
            (
                lambda: ether.attach(self.pipe.unet, EtherConfig(targets=("no",)), "x"),
                ValueError,
                "no Linear .* matches",
            ),
            (lambda: ether.set_adapters(self.pipe, known * 2), ValueError, "named twice"),
            (lambda: ether.set_adapters(self.pipe, known, float("nan")), ValueError, "finite"),
        ]
        verb, error, text = calls[kind]
        if known or kind < 5:
            self.attempt(verb, [Refusal(error, text)])
