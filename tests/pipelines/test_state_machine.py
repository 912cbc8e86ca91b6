"""Random sequences of verbs on a small pipeline; after each step it equals a dense fp64 model, or nothing has changed.

The pipeline is a real one whose UNet has two attention layers; ``states/model.py`` is the model of its state. After
every step the outputs of UNet and text encoder are compared with the model's, and the weights bit for bit. A verb that
raises must raise what is documented for the state, and must leave weights, vectors, ``ether.adapters`` and outputs bit
for bit as they were. Where a forward is refused, the way out that its message names is taken and must work. Every
sequence ends with everything taken off by documented verbs: the base must be what it was, and no hook may be left.

The suite runs a few sequences, the same ones each time. Many are run by hand:

    ETHER_STATE_SEQUENCES=2000 python -m pytest tests/pipelines/test_state_machine.py -s

They are runs of 100 sequences with numbers from ``ETHER_STATE_SEED`` (default 0) on; the one that fails is repeated by
its number. Only these runs compile, in at most one of 20 sequences.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator

import diffusers
import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from pipelines.states.adapters import AdapterRules
from pipelines.states.calls import CallRules
from pipelines.states.machine import COMPONENT, DATA
from pipelines.states.places import PlaceRules
from pipelines.states.weights import WeightRules
from pipelines.states.world import CHUNK, COMPONENTS, LONG_STEPS, NAMES, RUNS, SEQUENCES, SHORT, STEPS, first_files

import ether_diffusion as ether
from ether_diffusion.core.host import host_of


class AllRules(AdapterRules, WeightRules, CallRules, PlaceRules):
    """Every rule, from the first adapters to the end of a sequence."""

    @initialize(data=DATA, compiles=st.integers(0, 19), count=st.integers(0, 3), lora_first=st.booleans())
    def begin(self, data: st.DataObject, compiles: int, count: int, lora_first: bool) -> None:
        self.compiles_left = 2 if SEQUENCES and compiles == 17 else 0
        self.lora_first = lora_first
        self.files = list(first_files())
        self.last = self.snapshot()
        for name in NAMES[:count]:
            self.attach(data=data, component=data.draw(COMPONENT), name=name)
        if data.draw(st.booleans()):
            self.load_lora(data=data)

    def teardown(self) -> None:
        try:
            if self.settled:
                self.take_everything_off()
        finally:
            logging.getLogger("ether_diffusion").removeHandler(self.warnings)
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.compiled is not None:
                torch._dynamo.reset()
        RUNS["sequences"] += 1

    def take_everything_off(self) -> None:
        """By documented verbs alone, in one of two orders."""
        self.remove_offloading()
        if self.parts["unet"].qkv_fused:
            self.unfuse_qkv()
        if self.lora_first and self.lora_fused:
            self.unfuse_lora()
        self.look()
        self.unfuse(force=False)
        if self.any_fused():
            self.unfuse(force=True)
        assert not self.any_fused()
        if self.names():
            self.unload(data=None, one=False)
        if self.lora_fused:
            self.unfuse_lora()
        if self.loras():
            self.unload_lora()
        self.cast(dtype=torch.float32)
        self.look()
        assert ether.adapters(self.pipe) == {}
        for part in self.parts.values():
            for path in part.stored.keys() - part.rounded:
                assert torch.equal(part.stored[path], part.twin.get_submodule(path).weight)
        for component in COMPONENTS:
            module = self.module(component)
            assert host_of(module) is None
            hooks = [h for m in module.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
            assert not [hook for hook in hooks if hook.__module__.startswith("ether_diffusion")]

    def look(self) -> None:
        """The invariant, at a moment of the test's own choice."""
        self.settled = False
        self.everything_is_as_the_model_says()


OFTEN = {
    "compiled_call": 8,
    "fuse": 4,
    "unfuse": 2,
    "gradients": 3,
    "fuse_lora": 4,
    "unfuse_lora": 2,
    "set_loras": 2,
    "set_per_sample": 2,
    "load": 2,
}
"""Rules that need much to be possible, and so are offered several times."""
for rule_name, times in OFTEN.items():
    for number in range(1, times):
        setattr(AllRules, f"{rule_name}_{number}", getattr(AllRules, rule_name))


def run_many(sequences: int, steps: int, number: int | None = None, shrink: bool = True) -> None:
    """Run sequences: those of a number, or the same ones each time."""
    machine = AllRules if number is None else seed(number)(type("Numbered", (AllRules,), {}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=number is None,
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def quiet_libraries() -> Iterator[None]:
    """Without the progress bars and the advice of thousands of loads and casts."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    yield
    for library, level in zip(libraries, levels, strict=True):
        library.set_verbosity(level)
        library.enable_progress_bar()


@pytest.mark.slow
@pytest.mark.timeout(0 if SEQUENCES else 600)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::FutureWarning:transformers.*")
@pytest.mark.usefixtures("quiet_libraries")
def test_any_sequence_of_verbs_is_right_or_refused_and_has_a_way_out() -> None:
    if not SEQUENCES:
        run_many(SHORT, STEPS)
        return
    first = int(os.environ.get("ETHER_STATE_SEED", "0"))
    try:
        for number in range(first, first + -(-SEQUENCES // CHUNK)):
            print(f"{time.strftime('%H:%M:%S')} {RUNS['sequences']} sequences; next: number {number}", flush=True)
            run_many(min(CHUNK, SEQUENCES), LONG_STEPS, number)
    finally:
        for name, count in sorted(RUNS.items()):
            print(f"{count:8d}  {name}")
