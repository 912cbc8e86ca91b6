"""Rules: adapters come, go, change and act."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from hypothesis import strategies as st
from pipelines.states.machine import COMPONENT, DATA, FUSED, PipelineStates, step
from pipelines.states.model import Attached, Refusal, targeted
from pipelines.states.world import ATTENTION, COMPONENTS, METHODS, NAMES, STRENGTHS, TARGETS, Saved, shaken
from safetensors.torch import load_file

import ether_diffusion as ether
from ether_diffusion import EtherConfig


class AdapterRules(PipelineStates):
    """Verbs on adapters that are not fused."""

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
        paths = targeted(component, part.stored, config.targets)
        must = []
        if name in part.adapters:
            must.append(Refusal(ValueError, f"an adapter '{name}' is attached already"))
        if part.fused:
            must.append(FUSED)
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
        if self.attempt(self.adapter(component, name).detach, [FUSED] if part.fused else []):
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
            must.append(FUSED)
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
        if not self.attempt(lambda: ether.unload(self.pipe, name), [FUSED] if self.any_fused() else []):
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
        must = [FUSED] if self.any_fused() else []
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
        must = [FUSED] if self.any_fused() else []
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
        must = [FUSED] if changes and self.any_fused() else []
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
        must = [FUSED] if self.any_fused() and any(part.enabled for part in self.hosts()) else []
        try:
            self.attempt(within, must)
        except KeyboardInterrupt:
            assert fails
        for name, enabled in before.items():
            self.parts[name].enabled = enabled
        assert self.last is not None
        self.last.check_equal(self.snapshot())
