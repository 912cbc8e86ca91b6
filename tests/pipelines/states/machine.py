"""The pipeline and the model of its state side by side: how they are compared, and how a verb is tried."""

from __future__ import annotations

import copy
import functools
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pipelines.states.model import BATCH, Component, Refusal, first_tensor
from pipelines.states.world import (
    COMPONENTS,
    RUNS,
    TOLERANCE,
    Saved,
    Snapshot,
    Warnings,
    error_of,
    in_dtype,
    inputs,
    template,
)
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion import Adapter
from ether_diffusion.core.host import host_of


def step(when: Callable[[Any], bool] | None = None, **strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """A rule that counts itself, and says that the state is not settled until the invariant has looked at it."""

    def decorate(function: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def run(self: PipelineStates, **drawn: Any) -> None:
            self.settled = False
            RUNS[function.__name__] += 1
            function(self, **drawn)

        decorated = rule(**strategies)(run)
        return decorated if when is None else precondition(when)(decorated)

    return decorate


DATA = st.data()
COMPONENT = st.sampled_from(COMPONENTS)


FUSED = Refusal(RuntimeError, "while adapters are fused into the weights: call unfuse first")


class PipelineStates(RuleBasedStateMachine):
    """A pipeline and the model of its state, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.settled = False
        self.folder = Path(tempfile.mkdtemp(prefix="ether-states-"))
        self.pipe: DiffusionPipeline = copy.deepcopy(template())
        self.parts = {name: Component(name, copy.deepcopy(getattr(template(), name)).double()) for name in COMPONENTS}
        self.constants = {
            f"{name}.{key}": value.clone()
            for name in COMPONENTS
            for key, value in getattr(template(), name).state_dict().items()
        }
        self.files: list[Saved] = []
        self.lora_fused = False
        self.last: Snapshot | None = None
        self.compiled: Any = None
        self.compiles_left = 0
        self.lora_first = True
        self.warnings = Warnings()
        logging.getLogger("ether_diffusion").addHandler(self.warnings)

    # looking at the pipeline

    def module(self, component: str) -> nn.Module:
        found: nn.Module = getattr(self.pipe, component)
        return found

    def adapter(self, component: str, name: str) -> Adapter:
        host = host_of(self.module(component))
        assert host is not None
        return host.adapters[name]

    def run(self, component: str, given: Mapping[str, Tensor] | None = None, module: nn.Module | None = None) -> Tensor:
        given = in_dtype(given or inputs(component), self.parts[component].dtype)
        return first_tensor((self.module(component) if module is None else module)(**given))

    def weights_of(self, component: str) -> dict[str, Tensor]:
        """The component's own state dict, under the keys of a pipeline without LoRA."""
        return {
            key.replace(".base_layer", ""): value
            for key, value in self.module(component).state_dict().items()
            if "lora_" not in key and not re.search(r"\.to_q?kv\.", key)
        }

    def snapshot(self) -> Snapshot:
        outputs: dict[str, Tensor | str] = {}
        for component in COMPONENTS:
            try:
                with torch.no_grad():
                    outputs[component] = self.run(component)
            except (RuntimeError, ValueError) as error:
                outputs[component] = f"{type(error).__name__}: {error}"
        here = [c for c in COMPONENTS if not self.parts[c].offload]
        return Snapshot(
            outputs,
            {f"{c}.{key}": value.clone() for c in here for key, value in self.weights_of(c).items()},
            {
                f"{component}.{name}.{key}": value.clone()
                for component, part in self.parts.items()
                for name in part.adapters
                for key, value in self.adapter(component, name).state_dict().items()
            },
            ether.adapters(self.pipe),
        )

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        if self.settled:
            return
        now = self.snapshot()
        for component, part in self.parts.items():
            found = now.outputs[component]
            must, may = part.refusals()
            if isinstance(found, str):
                kind, _, text = found.partition(": ")
                assert any(r.kind.__name__ == kind and re.search(r.pattern, text) for r in must + may), found
                RUNS[f"refused: {component}'s forward"] += 1
                continue
            assert not must, f"{component}: the forward should have been refused: {must}"
            error = error_of(found, part.output(inputs(component)))
            assert error <= TOLERANCE[part.dtype], f"{component}: the output is off by {error:.2e}"
        self.check_weights(now.weights)
        self.check_vectors(now.vectors)
        self.check_infos(now.infos)
        self.last = now
        self.settled = True

    def check_weights(self, present: Mapping[str, Tensor]) -> None:
        for component, part in self.parts.items():
            if part.offload:
                continue
            mine = {key: value for key, value in present.items() if key.startswith(f"{component}.")}
            assert mine.keys() == {key for key in self.constants if key.startswith(f"{component}.")}
            for key, value in mine.items():
                path = key.removeprefix(f"{component}.").removesuffix(".weight")
                expected = part.stored[path] if path in part.stored and key.endswith(".weight") else self.constants[key]
                assert torch.equal(value.to(expected.dtype), expected), f"{key} is not what it was"

    def check_vectors(self, present: Mapping[str, Tensor]) -> None:
        expected = {
            f"{component}.{name}.{path}.{vector}": value
            for component, part in self.parts.items()
            for name, attached in part.adapters.items()
            for path, vectors in attached.vectors.items()
            for vector, value in vectors.items()
        }
        assert present.keys() == expected.keys()
        assert all(value.dtype == torch.float32 and torch.equal(value, expected[k]) for k, value in present.items())

    def check_infos(self, infos: Mapping[str, ether.AdapterInfo]) -> None:
        names = dict.fromkeys(name for part in self.parts.values() for name in part.adapters)
        assert infos.keys() == names.keys()
        for name, info in infos.items():
            parts = {c: part for c, part in self.parts.items() if name in part.adapters}
            strength = max(part.strengths.get(name, 0.0) for part in parts.values())
            assert info.components == tuple(parts)
            assert info.configs == {c: part.adapters[name].config for c, part in parts.items()}
            assert info.strength == strength
            assert info.active == (strength != 0 and all(part.enabled for part in parts.values()))
            assert info.fused == any(part.fused and part.strengths.get(name, 0.0) != 0.0 for part in parts.values())

    def attempt(self, verb: Callable[[], object], must: list[Refusal], may: list[Refusal] | None = None) -> bool:
        """Call a verb; whether it did what it says. Where it refuses, the error fits and nothing has changed."""
        try:
            verb()
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            if not any(refusal.fits(error) for refusal in [*must, *(may or [])]):
                raise
            assert self.last is not None
            self.last.check_equal(self.snapshot())
            RUNS[f"refused: {next(r.pattern for r in [*must, *(may or [])] if r.fits(error))}"] += 1
            return False
        assert not must, f"should have been refused: {must}"
        return True

    def take_over(self, component: str, expected: dict[str, Tensor]) -> None:
        present = {key.removesuffix(".weight"): value for key, value in self.weights_of(component).items()}
        self.parts[component].take_over(present, expected)

    # what the state says

    def hosts(self) -> list[Component]:
        return [part for part in self.parts.values() if part.adapters]

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for part in self.parts.values() for name in part.adapters))

    def any_fused(self) -> bool:
        return any(part.fused for part in self.hosts())

    def offloaded(self) -> bool:
        return any(part.offload for part in self.parts.values())

    def refused(self) -> bool:
        return any(part.refusals()[0] or part.refusals()[1] for part in self.parts.values())

    def quiet(self, component: str) -> bool:
        must, may = self.parts[component].refusals()
        return not must and not may

    def loras(self) -> list[str]:
        return list(dict.fromkeys(name for part in self.parts.values() for name in part.loras))

    def peft_may_change(self) -> bool:
        """Whether LoRAs may be changed: diffusers itself cannot do it under accelerate's hooks and fused q, k, v."""
        return not self.offloaded() and not any(part.qkv_fused for part in self.parts.values())

    def compare(self, component: str, module: nn.Module | None = None, batch: int = BATCH, seed: int = 0) -> None:
        given = inputs(component, batch, seed)
        with torch.no_grad():
            found = self.run(component, given, module)
        error = error_of(found, self.parts[component].output(given))
        assert error <= TOLERANCE[self.parts[component].dtype], f"{component}: the output is off by {error:.2e}"
