"""Random sequences of verbs on a small pipeline; after each step it equals a dense fp64 model, or nothing has changed.

The pipeline is a real one whose UNet has two attention layers; ``dense_state.py`` is the model of its state. After
every step the outputs of UNet and text encoder are compared with the model's, and the weights bit for bit. A verb that
raises must raise what is documented for the state, and must leave weights, vectors, ``ether.adapters`` and outputs bit
for bit as they were. Where a forward is refused, the way out that its message names is taken and must work. Every
sequence ends with everything taken off by documented verbs: the base must be what it was, and no hook may be left.

The suite runs a few sequences, the same ones each time. Many are run by hand:

    ETHER_STATE_SEQUENCES=2000 python -m pytest tests/pipelines/test_state_machine.py -s

They are runs of 100 sequences with numbers from ``ETHER_STATE_SEED`` (default 0) on; the one that fails is repeated by
its number. Only these runs compile, in about one of 30 sequences.
"""

from __future__ import annotations

import atexit
import copy
import functools
import logging
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import HookRegistry
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pipelines.dense_state import (
    BATCH,
    MERGED_BENEATH,
    QKV_FUSED,
    WRONG_BATCH,
    Attached,
    Component,
    Lora,
    Refusal,
    Vectors,
    first_tensor,
    targeted,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel

import ether_diffusion as ether
from ether_diffusion import Adapter, EtherConfig
from ether_diffusion.core.host import host_of
from ether_diffusion.core.linear import SwitchedError
from ether_diffusion.playground.tiny import tiny_tokenizer

SEQUENCES = int(os.environ.get("ETHER_STATE_SEQUENCES", "0"))
"""Sequences of a run by hand; 0 is the suite's short run."""
SHORT, STEPS, LONG_STEPS = 40, 15, 20
CHUNK = 100
"""Sequences of one run of hypothesis; a failure names the run, which is repeated by its number alone."""
COMPONENTS = ("unet", "text_encoder")
NAMES = ("a", "b", "c")
STRENGTHS = (1.0, 0.7, 0.0, -0.5)
LORA_NAMES = ("ink", "oil")
TARGETS: dict[str, tuple[str | tuple[str, ...], ...]] = {
    "unet": (
        "attention",
        "self_attention",
        "cross_attention",
        "attention+geglu",
        ("attn1.to_q", "attn2.to_v"),
        ("ff.net.2",),
        ("attn?.to_out.0", "time_embedding.*"),
        ("*",),
    ),
    "text_encoder": ("attention", ("q_proj", "fc1"), ("*",)),
}
METHODS = (("ether", True), ("ether_plus", True), ("ether_plus", False), ("naive", True))
ATTENTION = re.compile(r"attn[12]\.to_")
BLOCK = {"unet": "mid_block.attentions.0.transformer_blocks.0", "text_encoder": "encoder"}
"""A part of each component that is called alone."""
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2**-5}
"""Largest error of an output over its largest value. The frozen model's own is 5e-7 in fp32, 8e-3 in bf16; adapters
have fp32 vectors, in fp64 too."""
GRADIENTS = {torch.float64: 1e-5, torch.float32: 1e-4}
"""The same for the gradients of an adapter; sums over tokens in bf16 have no bound that says anything."""
RUNS: Counter[str] = Counter()
"""How often each rule ran, and what was refused."""


def state_pipeline() -> DiffusionPipeline:
    """A Stable Diffusion pipeline whose UNet has two attention layers; all weights are bf16 numbers, kept in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(32,),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D",),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=("UpBlock2D",),
            cross_attention_dim=16,
            attention_head_dim=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=16,
                intermediate_size=32,
                num_attention_heads=2,
                num_hidden_layers=1,
                projection_dim=16,
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    for module in (unet, text_encoder):
        module.requires_grad_(False).eval().to(torch.bfloat16).float()
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@functools.cache
def template() -> DiffusionPipeline:
    return state_pipeline()


def inputs(component: str, batch: int = BATCH, seed: int = 0) -> dict[str, Tensor]:
    """A batch whose samples differ, of numbers that bf16 has."""
    generator = torch.Generator().manual_seed(seed)
    if component == "text_encoder":
        return {"input_ids": torch.randint(0, 40, (batch, 6), generator=generator)}
    return {
        "sample": torch.randn(batch, 4, 4, 4, generator=generator).bfloat16().float(),
        "timestep": torch.arange(10, 10 + batch),
        "encoder_hidden_states": torch.randn(batch, 3, 16, generator=generator).bfloat16().float(),
    }


def part_inputs(component: str, seed: int = 0) -> dict[str, Tensor]:
    """A batch for the part of a component."""
    generator = torch.Generator().manual_seed(seed)
    if component == "text_encoder":
        return {"inputs_embeds": torch.randn(BATCH, 6, 16, generator=generator).bfloat16().float()}
    return {
        "hidden_states": torch.randn(BATCH, 16, 32, generator=generator).bfloat16().float(),
        "encoder_hidden_states": torch.randn(BATCH, 3, 16, generator=generator).bfloat16().float(),
    }


def in_dtype(given: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}


def error_of(found: Tensor, expected: Tensor) -> float:
    """Largest error over the largest value."""
    assert found.isfinite().all()
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def of_bits(generator: torch.Generator, *shape: int, scale: float) -> Tensor:
    return (scale * torch.randn(*shape, generator=generator)).bfloat16().float()


@dataclass
class Snapshot:
    """All that a verb which is refused must leave as it is."""

    outputs: dict[str, Tensor | str]
    weights: dict[str, Tensor]
    vectors: dict[str, Tensor]
    infos: dict[str, ether.AdapterInfo]

    def check_equal(self, other: Snapshot) -> None:
        assert self.infos == other.infos
        for mine, theirs in (
            (self.outputs, other.outputs),
            (self.weights, other.weights),
            (self.vectors, other.vectors),
        ):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                same = torch.equal(value, theirs[key]) if isinstance(value, Tensor) else value == theirs[key]
                assert same, f"{key} is not what it was"


@dataclass
class Saved:
    """An adapter file and what is in it."""

    path: Path
    content: dict[str, Attached] = field(repr=False)
    of_base: bool


class Warnings(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@functools.cache
def first_files() -> tuple[Saved, ...]:
    """Two adapters that every sequence may load: one of both components, and one of the UNet alone."""
    pipe, folder = state_pipeline(), Path(tempfile.mkdtemp(prefix="ether-states-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, components, config in (
        ("both", COMPONENTS, EtherConfig(n_blocks=2)),
        ("one", COMPONENTS[:1], EtherConfig("ether", targets="attention+geglu")),
    ):
        for component in components:
            shaken(ether.attach(getattr(pipe, component), config, name), seed=len(name))
        ether.save(pipe, folder / name, name)
    return tuple(
        Saved(
            folder / name,
            {
                component: Attached(info.configs[component], copied(host_of(getattr(pipe, component)).adapters[name]))
                for component in info.components
            },
            of_base=True,
        )
        for name, info in ether.adapters(pipe).items()
    )


def shaken(adapter: Adapter, seed: int) -> Vectors:
    """Move the vectors off the identity, and return a copy of them."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.05 if adapter.config.method == "naive" else 0.15
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return copied(adapter)


def copied(adapter: Adapter) -> Vectors:
    """The adapter's vectors as plain data."""
    found: Vectors = {}
    for key, value in adapter.state_dict().items():
        path, _, vector = key.rpartition(".")
        found.setdefault(path, {})[vector] = value.clone()
    return found


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
        self.way_out = ""
        self.warnings = Warnings()
        logging.getLogger("ether_diffusion").addHandler(self.warnings)

    @initialize(data=DATA, compiles=st.integers(0, 29), count=st.integers(0, 3), lora_first=st.booleans())
    def begin(self, data: st.DataObject, compiles: int, count: int, lora_first: bool) -> None:
        self.compiles_left = 2 if SEQUENCES and compiles == 17 else 0
        self.lora_first = lora_first
        self.files = list(first_files())
        self.last = self.snapshot()
        for name in NAMES[:count]:
            self.attach(data=data, component=data.draw(COMPONENT), name=name)
        if data.draw(st.booleans()):
            self.load_lora(data=data)

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

    FUSED = Refusal(RuntimeError, "while adapters are fused into the weights: call unfuse first")

    # adapters

    def settings(self, data: st.DataObject, component: str) -> EtherConfig:
        method, two_sided = data.draw(st.sampled_from(METHODS))
        return EtherConfig(
            method=method,
            two_sided=two_sided,
            n_blocks=data.draw(st.sampled_from((1, 2, 4))),
            targets=data.draw(st.sampled_from(TARGETS[component])),
            seed=data.draw(st.integers(0, 3)),
        )

    @step(data=DATA, component=COMPONENT, name=st.sampled_from(NAMES))
    def attach(self, data: st.DataObject, component: str, name: str) -> None:
        part, config = self.parts[component], self.settings(data, component)
        # like another adapter in most cases, so that they can share a batch
        if part.adapters and data.draw(st.sampled_from((True, True, False))):
            config = replace(next(iter(part.adapters.values())).config, seed=config.seed)
        if part.qkv_left and "*" in config.targets:
            return  # known defect: Linears that unfuse_qkv_projections() leaves behind are taken for projections
        paths = targeted(component, part.stored, config.targets)
        must = []
        if name in part.adapters:
            must.append(Refusal(ValueError, f"an adapter '{name}' is attached already"))
        if part.fused:
            must.append(self.FUSED)
        if part.qkv_fused and any(ATTENTION.search(path) for path in paths):
            must.append(Refusal(ValueError, "call unfuse_qkv_projections"))
        if self.attempt(lambda: ether.attach(self.module(component), config, name), must):
            adapter = self.adapter(component, name)
            assert set(adapter.methods()) == set(paths)
            part.add(name, Attached(config, shaken(adapter, data.draw(st.integers(0, 99)))))

    @step(lambda self: self.names(), data=DATA)
    def change_vectors(self, data: st.DataObject) -> None:
        """A step of an optimizer that is not the test's; fused weights stay what they are."""
        component, name = data.draw(st.sampled_from([(c, n) for c, p in self.parts.items() for n in p.adapters]))
        part = self.parts[component]
        part.adapters[name].vectors = shaken(self.adapter(component, name), data.draw(st.integers(0, 99)))
        part.recast_since_fuse = part.recast_since_fuse or part.fused

    @step(lambda self: self.names(), data=DATA)
    def detach(self, data: st.DataObject) -> None:
        component, name = data.draw(st.sampled_from([(c, n) for c, p in self.parts.items() for n in p.adapters]))
        part = self.parts[component]
        if self.attempt(self.adapter(component, name).detach, [self.FUSED] if part.fused else []):
            part.remove(name)

    @step(lambda self: self.names(), data=DATA)
    def save(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names()))
        path = ether.save(self.pipe, self.folder / f"{len(self.files)}", name)
        content = {
            component: copy.deepcopy(part.adapters[name])
            for component, part in self.parts.items()
            if name in part.adapters
        }
        state = load_file(path)
        assert {f"{c}.{p}.{k}" for c, a in content.items() for p, vs in a.vectors.items() for k in vs} == state.keys()
        for component, attached in content.items():
            for place, vectors in attached.vectors.items():
                assert all(torch.equal(state[f"{component}.{place}.{k}"], value) for k, value in vectors.items())
        self.files.append(Saved(path, content, self.of_base()))

    def of_base(self) -> bool:
        """Whether the base weights are those of the beginning, to rounding."""
        return not any(part.merged for part in self.parts.values()) and all(
            (weight - part.twin.get_submodule(path).weight).abs().max() < 1e-4
            for part in self.parts.values()
            for path, weight in part.base.items()
        )

    @step(lambda self: self.files, data=DATA, name=st.sampled_from(NAMES), strength=st.sampled_from(STRENGTHS))
    def load(self, data: st.DataObject, name: str, strength: float) -> None:
        file = self.files[data.draw(st.integers(0, len(self.files) - 1))]
        must = []
        if name in self.names():
            must.append(Refusal(ValueError, f"an adapter '{name}' is loaded already"))
        if self.any_fused():
            must.append(self.FUSED)
        if self.parts["unet"].qkv_fused and "unet" in file.content:
            paths = file.content["unet"].vectors
            if any(ATTENTION.search(path) for path in paths):
                must.append(Refusal(ValueError, "call unfuse_qkv_projections"))
        enabled = all(part.enabled for part in self.hosts())
        sampled = any(part.per_sample is not None for part in self.hosts())
        self.warnings.messages.clear()
        if not self.attempt(lambda: ether.load(self.pipe, file.path, name, strength), must):
            return
        told = " ".join(self.warnings.messages)
        assert not (file.of_base and self.of_base() and "another base" in told), told
        for component, attached in file.content.items():
            part = self.parts[component]
            new = not part.adapters
            part.add(name, copy.deepcopy(attached), acts=not sampled)
            part.enabled = part.enabled and (enabled or not new)
            if not sampled:
                part.strengths[name] = strength

    @step(lambda self: self.names(), data=DATA, one=st.booleans())
    def unload(self, data: st.DataObject, one: bool) -> None:
        name = data.draw(st.sampled_from(self.names())) if one else None
        if not self.attempt(lambda: ether.unload(self.pipe, name), [self.FUSED] if self.any_fused() else []):
            return
        for gone in [name] if name else self.names():
            sampled = any(gone in (part.per_sample or ()) for part in self.hosts())
            for part in self.hosts():
                if sampled:
                    part.strengths, part.per_sample = {}, None
                if gone in part.adapters:
                    part.remove(gone)

    # what acts

    @step(lambda self: self.names(), data=DATA)
    def set_adapters(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(self.names()), unique=True))
        strengths = [data.draw(st.sampled_from(STRENGTHS)) for _ in names]
        must = [self.FUSED] if self.any_fused() else []
        if self.attempt(lambda: ether.set_adapters(self.pipe, names, strengths), must):
            for part in self.hosts():
                chosen = zip(names, strengths, strict=True)
                part.strengths, part.per_sample = {n: s for n, s in chosen if n in part.adapters}, None

    @step(lambda self: self.names(), data=DATA, count=st.sampled_from((2, 2, 4, 3)))
    def set_per_sample(self, data: st.DataObject, count: int) -> None:
        first = data.draw(st.sampled_from(self.names()))
        fits = data.draw(st.sampled_from((True, True, False)))
        others = [name for name in self.names() if not fits or self.alike(first, name)]
        names = [first, *(data.draw(st.sampled_from([None, *others])) for _ in range(count - 1))]
        names = data.draw(st.permutations(names))
        must = [self.FUSED] if self.any_fused() else []
        chosen = list(dict.fromkeys(name for name in names if name is not None))
        for part in self.hosts():
            configs = [part.adapters[name].config for name in chosen if name in part.adapters]
            if any(config.method == "naive" for config in configs):
                must.append(Refusal(ValueError, "per_sample mixes reflections only"))
            if any(replace(config, seed=0) != replace(configs[0], seed=0) for config in configs):
                must.append(Refusal(ValueError, "the adapters of a batch must have the same settings"))
        if self.attempt(lambda: ether.set_adapters(self.pipe, per_sample=names), must):
            for part in self.hosts():
                here = tuple(name if name in part.adapters else None for name in names)
                part.strengths = {name: 1.0 for name in here if name is not None}
                part.per_sample = here if part.strengths else None

    def alike(self, first: str, second: str) -> bool:
        """Whether two adapters can share a batch wherever both are."""
        configs = [
            [replace(part.adapters[name].config, seed=0) for name in (first, second) if name in part.adapters]
            for part in self.hosts()
        ]
        return all(len(set(each)) <= 1 and all(config.method != "naive" for config in each) for each in configs)

    def switch(self, enabled: bool) -> None:
        changes = any(part.enabled != enabled for part in self.hosts())
        must = [self.FUSED] if changes and self.any_fused() else []
        verb = ether.enable if enabled else ether.disable
        if self.attempt(lambda: verb(self.pipe), must):
            for part in self.hosts():
                part.enabled = enabled

    @step(lambda self: self.names())
    def disable(self) -> None:
        self.switch(False)

    @step(lambda self: self.names())
    def enable(self) -> None:
        self.switch(True)

    @step(lambda self: self.names(), fails=st.booleans())
    def disabled(self, fails: bool) -> None:
        def within() -> None:
            with ether.disabled(self.pipe):
                for part in self.hosts():
                    part.enabled = False
                for component in filter(self.quiet, COMPONENTS):
                    self.compare(component)
                if fails:
                    raise KeyboardInterrupt

        before = {name: part.enabled for name, part in self.parts.items()}
        must = [self.FUSED] if self.any_fused() and any(part.enabled for part in self.hosts()) else []
        try:
            self.attempt(within, must)
        except KeyboardInterrupt:
            assert fails
        for name, enabled in before.items():
            self.parts[name].enabled = enabled
        assert self.last is not None
        self.last.check_equal(self.snapshot())

    def compare(self, component: str, module: nn.Module | None = None, batch: int = BATCH, seed: int = 0) -> None:
        given = inputs(component, batch, seed)
        with torch.no_grad():
            found = self.run(component, given, module)
        error = error_of(found, self.parts[component].output(given))
        assert error <= TOLERANCE[self.parts[component].dtype], f"{component}: the output is off by {error:.2e}"

    # weights

    @step(lambda self: self.names())
    def fuse(self) -> None:
        parts = [part for part in self.hosts() if part.enabled and any(part.strengths.values())]
        must = [] if parts else [Refusal(ValueError, "there is no active adapter to fuse")]
        may = []
        for part in parts:
            if part.fused:
                must.append(self.FUSED)
                continue
            paths = part.acting_paths()
            if part.per_sample is not None:
                must.append(Refusal(ValueError, "call set_adapters first"))
            if part.qkv_fused:
                attention = any(ATTENTION.search(path) for path in paths)
                (must if attention else may).append(Refusal(ValueError, r"call unfuse_qkv_projections\(\)"))
            if part.offload.startswith("group"):
                must.append(Refusal(ValueError, "cannot fuse under group offloading"))
            if part.offload == "accelerate":
                must.append(Refusal(ValueError, r"offloaded weights: call pipe\.remove_all_hooks\(\)"))
            if part.merged & paths:
                must.append(Refusal(RuntimeError, r"cannot fuse: PEFT has merged .* call pipe\.unfuse_lora\(\)"))
        if not self.attempt(lambda: ether.fuse(self.pipe), must, may):
            return
        for part in parts:
            acting, paths = part.acting(), part.acting_paths()
            loras, part.loras = part.loras, {}
            expected = {path: weight for path, weight in part.weights(acting).items() if path in paths}
            part.loras = loras
            part.fused, part.fused_paths = True, frozenset(paths)
            part.rounded_since_fuse, part.recast_since_fuse = frozenset(), False
            self.take_over(part.name, expected)
            part.written = {path: part.stored[path] for path in paths}

    @step(lambda self: self.any_fused(), force=st.booleans())
    def unfuse(self, force: bool) -> None:
        must: list[Refusal] = []
        may: list[Refusal] = []
        changed = Refusal(RuntimeError, r"was changed since .* or call ether\.unfuse\(pipe, force=True\)")
        parts = [part for part in self.hosts() if part.fused]
        for part in parts:
            if part.qkv_fused:
                attention = any(ATTENTION.search(p) for a in part.adapters.values() for p in a.vectors)
                (must if attention else may).append(Refusal(RuntimeError, r"call unfuse_qkv_projections\(\) first"))
            if part.offload.startswith("group"):
                must.append(Refusal(ValueError, "cannot unfuse under group offloading"))
            if part.offload == "accelerate":
                must.append(Refusal(ValueError, r"cannot unfuse offloaded weights: call pipe\.remove_all_hooks\(\)"))
            if force:
                continue
            if part.merged & part.fused_paths:
                must.append(Refusal(RuntimeError, r"PEFT has merged .* call pipe\.unfuse_lora\(\) first, or .*force"))
            elif part.tampered():
                must.append(changed)
            elif part.recast_since_fuse or part.rounded_since_fuse - part.lora_paths():
                # known defects: PEFT's rounding is told from a change only while its layer is there, and a cast or a
                # step of the vectors since fusing is taken for one; force=True is the way out
                may.append(changed)
        if not self.attempt(lambda: ether.unfuse(self.pipe, force=force), must, may):
            return
        for part in parts:
            part.base = {path: weight.to(part.dtype).double() for path, weight in part.base.items()}
            for path in part.fused_paths:
                part.stored[path] = part.base[path]
            part.merged -= part.fused_paths
            part.fused, part.fused_paths, part.written = False, frozenset(), {}
            part.base = dict(part.stored)

    # LoRAs of PEFT

    @step(
        lambda self: len(self.loras()) < len(LORA_NAMES) and self.peft_may_change() and not self.lora_fused, data=DATA
    )
    def load_lora(self, data: st.DataObject) -> None:
        name = next(name for name in LORA_NAMES if name not in self.loras())
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        patterns = {
            "unet": data.draw(st.sampled_from((("to_q", "to_v"), ("attn?.to_k", "ff.net.2", "to_out.0"), ("to_v",)))),
            "text_encoder": data.draw(st.sampled_from(((), ("q_proj", "fc1")))),
        }
        state: dict[str, Tensor] = {}
        made: dict[str, Lora] = {}
        for component, part in self.parts.items():
            prefix = "unet" if component == "unet" else "text_encoder.text_model"
            lora = Lora({})
            for path in targeted(component, part.stored, patterns[component]):
                wide, narrow = part.stored[path].shape
                down, up = of_bits(generator, 2, narrow, scale=0.3), of_bits(generator, wide, 2, scale=0.1)
                lora.factors[path] = down, up
                state |= {f"{prefix}.{path}.lora_A.weight": down, f"{prefix}.{path}.lora_B.weight": up}
            if lora.factors:
                made[component] = lora
        self.pipe.load_lora_weights(state, adapter_name=name)
        for component, lora in made.items():
            self.parts[component].loras[name] = lora
        self.weigh_loras(data)
        if data.draw(st.booleans()):
            self.fuse_lora()

    def weigh_loras(self, data: st.DataObject) -> None:
        weights = {name: data.draw(st.sampled_from((1.0, 0.5, -0.5, 0.0))) for name in self.loras()}
        self.pipe.set_adapters(list(weights), list(weights.values()))
        for component, part in self.parts.items():
            part.lora_weights = weights
            self.module(component).to(part.dtype)  # PEFT makes fp32 factors in an fp64 model
            self.module(component).requires_grad_(False)

    @step(lambda self: self.loras() and self.peft_may_change() and not self.lora_fused, data=DATA)
    def set_loras(self, data: st.DataObject) -> None:
        self.weigh_loras(data)

    @step(lambda self: self.loras() and self.peft_may_change() and not self.lora_fused)
    def fuse_lora(self) -> None:
        self.pipe.fuse_lora(components=list(COMPONENTS))
        self.lora_fused = True
        for component, part in self.parts.items():
            paths = part.lora_paths()
            self.lora_written(component, paths, 1.0)
            part.merged = paths

    @step(lambda self: self.lora_fused and self.peft_may_change())
    def unfuse_lora(self) -> None:
        self.pipe.unfuse_lora(components=list(COMPONENTS))
        self.lora_fused = False
        for component, part in self.parts.items():
            self.lora_written(component, part.merged, -1.0)
            part.merged = frozenset()

    def lora_written(self, component: str, paths: frozenset[str], sign: float) -> None:
        part = self.parts[component]
        expected = {}
        for path in paths:
            added = [part.lora_weights[name] * lora.delta(path) for name, lora in part.loras.items()]
            expected[path] = part.stored[path] + sign * torch.as_tensor(sum(added))
        self.take_over(component, expected)
        part.rounded_since_fuse |= part.fused_paths & paths
        part.base |= {path: part.stored[path] for path in paths if path not in part.fused_paths}

    @step(lambda self: self.loras() and self.peft_may_change())
    def unload_lora(self) -> None:
        """Merged ones stay in the weights, as diffusers has it."""
        self.pipe.unload_lora_weights()
        self.lora_fused = False
        for part in self.parts.values():
            part.loras, part.lora_weights, part.merged = {}, {}, frozenset()

    # training

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

    # where the model is, and in how many copies

    @step(lambda self: not all(part.offload for part in self.parts.values()), data=DATA)
    def offload(self, data: st.DataObject) -> None:
        component = data.draw(st.sampled_from([c for c, part in self.parts.items() if not part.offload]))
        part, module = self.parts[component], self.module(component)
        kind = data.draw(st.sampled_from(("accelerate", "group leaf", "group block", "group leaf disk", "group disk")))
        if component == "text_encoder":
            kind = "accelerate"
        if kind == "accelerate":
            cpu_offload(module, execution_device=torch.device("cpu"))
        else:
            leaf = "leaf" in kind
            module.enable_group_offload(
                onload_device=torch.device("cpu"),
                offload_device=torch.device("cpu"),
                offload_type="leaf_level" if leaf else "block_level",
                num_blocks_per_group=None if leaf else 1,
                offload_to_disk_path=tempfile.mkdtemp(dir=self.folder) if kind.endswith("disk") else None,
            )
        part.offload = kind

    @step(lambda self: self.offloaded())
    def bring_back(self) -> None:
        self.remove_offloading()

    def remove_offloading(self) -> None:
        self.pipe.remove_all_hooks()
        for component, part in self.parts.items():
            if part.offload.startswith("group"):
                module = self.module(component)
                for inside in module.modules():  # diffusers has no verb for it
                    hooks = getattr(getattr(inside, "_diffusers_hook", None), "hooks", {})
                    for hook in hooks.values():
                        hook.group.onload_()
                HookRegistry.check_if_exists_or_initialize(module).remove_hook("group_offloading", recurse=True)
            part.offload = ""

    @step(lambda self: not self.offloaded(), dtype=st.sampled_from(tuple(TOLERANCE)))
    def cast(self, dtype: torch.dtype) -> None:
        self.pipe.to(dtype)
        for part in self.parts.values():
            part.cast(dtype)

    @step(lambda self: not self.parts["unet"].offload, goes_on=st.booleans())
    def copy_the_unet(self, goes_on: bool) -> None:
        part = self.parts["unet"]
        twin = copy.deepcopy(self.pipe.unet)
        if self.quiet("unet"):
            self.compare("unet", twin)
        original, kept = (self.pipe.unet, twin) if goes_on else (twin, self.pipe.unet)
        if (host := host_of(original)) is not None and not host.fused:
            for adapter in list(host.adapters.values()):
                adapter.detach()
            assert host_of(original) is None
        self.pipe.unet = kept
        self.compiled = None
        for name in part.adapters:
            assert self.adapter("unet", name).host is host_of(kept)

    @step(lambda self: self.names(), data=DATA)
    def copy_an_adapter(self, data: st.DataObject) -> None:
        component, name = data.draw(st.sampled_from([(c, n) for c, p in self.parts.items() for n in p.adapters]))
        adapter = self.adapter(component, name)
        twin = copy.deepcopy(adapter)
        assert twin.host is None
        assert twin.num_parameters() == adapter.num_parameters() == sum(p.numel() for p in twin.parameters())
        shaken(twin, 1)

    @step(lambda self: not self.loras() and not self.offloaded() and not self.parts["unet"].qkv_fused)
    def fuse_qkv(self) -> None:
        """Of attention layers without LoRA and offloading, which diffusers itself would leave out."""
        self.pipe.unet.fuse_qkv_projections()
        self.parts["unet"].qkv_fused = self.parts["unet"].qkv_left = True

    @step(lambda self: self.parts["unet"].qkv_fused)
    def unfuse_qkv(self) -> None:
        self.pipe.unet.unfuse_qkv_projections()
        self.parts["unet"].qkv_fused = False

    # calls of other kinds

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
        if not self.quiet(component):
            return  # known defect: only the forward of the whole model refuses a LoRA merged beneath an adapter
        given = part_inputs(component, number)
        with torch.no_grad():
            block = self.module(component).get_submodule(BLOCK[component])
            found = first_tensor(block(**in_dtype(given, part.dtype)))
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

    # ways out

    @step(lambda self: self.refused(), data=DATA)
    def take_the_way_out(self, data: st.DataObject) -> None:
        """Do what the refused forward's message says."""
        wanted = [r for part in self.parts.values() for group in part.refusals() for r in group]
        refusal = data.draw(st.sampled_from(list(dict.fromkeys(wanted))))
        if refusal == MERGED_BENEATH and self.peft_may_change():
            self.pipe.unfuse_lora(components=list(COMPONENTS))
            self.lora_fused = False
            for component, part in self.parts.items():
                self.lora_written(component, part.merged, -1.0)
                part.merged = frozenset()
        elif refusal == QKV_FUSED:
            self.pipe.unet.unfuse_qkv_projections()
            self.parts["unet"].qkv_fused = False
        elif refusal == WRONG_BATCH:
            ether.set_adapters(self.pipe, [])
            for part in self.hosts():
                part.strengths, part.per_sample = {}, None
        assert all(refusal not in part.refusals()[0] for part in self.parts.values()) or not self.peft_may_change()

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
        setattr(PipelineStates, f"{rule_name}_{number}", getattr(PipelineStates, rule_name))


def run_many(sequences: int, steps: int, number: int | None = None, shrink: bool = True) -> None:
    """Run sequences: those of a number, or the same ones each time."""
    machine = PipelineStates if number is None else seed(number)(type("Numbered", (PipelineStates,), {}))
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
