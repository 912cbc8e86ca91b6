"""Attach adapters to a frozen model, and turn them on, off, up, down, or into the weights."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.adapter import Adapter, check_blocks
from ether_diffusion.core.functional import matmul_dtype
from ether_diffusion.core.linear import Projection, fill_missing
from ether_diffusion.core.methods import Reflection
from ether_diffusion.core.offload import grouped
from ether_diffusion.core.plan import Generations, Mixture, Off, PerSample, Plan, SampleNames, check_mixable
from ether_diffusion.core.rows import Slots, close_forward, open_forward
from ether_diffusion.core.switches import refuse_switches
from ether_diffusion.core.targets import Target, find_targets, has_fused_qkv, module_at, root_of, unwrapped, wrapper_at
from ether_diffusion.core.weights import plain_weight
from ether_diffusion.private import hooks_changed


class Host:
    """All adapters of one model: which are there, and what they do together.

    What acts is decided here, and handed to the projections as immutable plans (:mod:`ether_diffusion.core.plan`).

    Attributes:
        model: the module that canonical paths start from.
        adapters: by name.
        strengths: of the adapters that are set to act on every sample, or on samples of their own.
        per_sample: which sample has which adapter; None where all have the same.
        enabled: whether any acts.
        fused: whether those that act are folded into the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.strengths: dict[str, float] = {}
        self.per_sample: SampleNames | None = None
        self.enabled = True
        self.fused = False
        self._projections: dict[str, Projection] = {}
        self._guards: dict[nn.Module, Any] = {}
        self._generations = Generations()
        self._generation = 0
        self.vectors_changed()
        self._slots = Slots([])
        self._links: list[Link] = []
        self._wrappers: list[tuple[Projection, Any]] = []
        self._switches: list[nn.Module] = []
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for adapter in self.adapters.values():  # a copy of an adapter alone forgets its host
            adapter.set_host(self)

    def add(self, adapter: Adapter, targets: list[Target]) -> None:
        """Put an adapter on its targets; it is active at strength 1, unless each sample has an adapter of its own."""
        self.refuse_if_fused("attach another adapter")
        methods = adapter.methods()
        for target in targets:
            projection = self._projections.get(target.path)
            if projection is None:
                projection = self._projections[target.path] = Projection(target.path, target.module, self)
            projection.put(adapter.adapter_name, methods[target.path])
            self._links = []  # new places to watch
            if target.attention is not None and target.attention not in self._guards:
                guard = target.attention.register_forward_pre_hook(self._guard)
                self._guards[target.attention] = guard
        self.adapters[adapter.adapter_name] = adapter
        adapter.set_host(self)
        hooks_changed(self.model)
        if self.per_sample is None:
            self.set_active({**self.strengths, adapter.adapter_name: 1.0})
        else:
            self._plan()

    def remove(self, name: str) -> None:
        """Take an adapter off; the last one takes all hooks with it. None is active if samples had this one."""
        self.refuse_if_fused(f"remove {name!r}")
        adapter = self.adapters.pop(name)
        adapter.set_host(None)
        for path in [path for path, projection in self._projections.items() if name in projection.methods]:
            projection = self._projections[path]
            del projection.methods[name]
            if not projection.methods:
                projection.remove()
                del self._projections[path]
        hooks_changed(self.model)
        if self.per_sample is None:
            self.set_active({key: strength for key, strength in self.strengths.items() if key != name})
        elif name in self.per_sample.adapters:
            self.set_active({})  # no sample goes on with another adapter unasked
        else:
            self._plan()
        if not self.adapters:
            for handle in [*self._guards.values(), *self._handles]:
                handle.remove()
            del self.model.__dict__[_ATTRIBUTE]

    def set_active(self, strengths: Mapping[str, float]) -> None:
        """Make exactly these adapters active; strength s means W + s ΔW, and several add their ΔW.

        Raises:
            ValueError: a name that is not attached, or a strength that is not finite.
            RuntimeError: the adapters are fused.
        """
        self.refuse_if_fused("change which adapters are active")
        for name, strength in strengths.items():
            if name not in self.adapters:
                raise ValueError(f"no adapter {name!r} here; there are: {', '.join(self.adapters) or 'none'}")
            if not math.isfinite(strength):
                raise ValueError(f"the strength of {name!r} must be a finite number, not {strength}")
        self.strengths, self.per_sample = dict(strengths), None
        self._plan()

    def set_per_sample(self, names: Sequence[str | None]) -> None:
        """Give each sample of a batch an adapter of its own, at strength 1; None is the base.

        Sample i of a forward has entry i modulo the number of entries. Gradients reach each adapter's own vectors.

        Raises:
            ValueError: no name, a name that is not attached, adapters of different settings, or of the method Naive.
            RuntimeError: the adapters are fused.
        """
        self.refuse_if_fused("change which adapters are active")
        per_sample = SampleNames(tuple(names))
        if unknown := [name for name in per_sample.adapters if name not in self.adapters]:
            raise ValueError(f"no adapter {unknown[0]!r} here; there are: {', '.join(self.adapters) or 'none'}")
        check_mixable({name: self.adapters[name] for name in per_sample.adapters})
        self.strengths = dict.fromkeys(per_sample.adapters, 1.0)
        self.per_sample = per_sample if per_sample.adapters else None
        self._plan()

    def enable(self, enabled: bool = True) -> None:
        """Turn all adapters on or off, remembering strengths."""
        if enabled != self.enabled:
            self.refuse_if_fused("turn adapters on or off")
            self.enabled = enabled
            self._plan()

    def fuse(self) -> None:
        """Fold the active adapters into the weights; :meth:`unfuse` restores the base bit for bit.

        Raises:
            ValueError: a weight is quantised, sharded or offloaded, or q, k, v are fused; no weight has been changed.
        """
        self.refuse_if_fused("fuse again")
        if self.per_sample is not None:
            raise ValueError("each sample has an adapter of its own, which no weight can hold: call set_adapters first")
        if any(has_fused_qkv(attention) for attention in self._guards):
            raise ValueError("the q, k, v projections are fused: call unfuse_qkv_projections() before fusing adapters")
        self._refuse_groups("fuse")
        self._follow()
        if merged := self._merged_by_peft():
            raise RuntimeError(
                f"cannot fuse: PEFT has merged {', '.join(merged)} into the same weights; call pipe.unfuse_lora() "
                "first, and pipe.fuse_lora() after fusing the adapter"
            )
        self._refuse_tied()
        try:
            for projection in self._projections.values():
                projection.fuse()
        except BaseException:
            for projection in reversed(list(self._projections.values())):
                projection.unfuse()
            raise
        self.fused = True
        self._plan()

    def check_unfuse(self, force: bool = False) -> None:
        """Raise what keeps the base weights from being put back.

        Args:
            force: whether what others have added to the weights since may be lost.

        Raises:
            RuntimeError: q, k, v were fused since, or something else has changed a weight since.
            ValueError: a weight is offloaded.
        """
        if any(has_fused_qkv(attention) for attention in self._guards):
            raise RuntimeError(
                "the q, k, v projections were fused after the adapter: call unfuse_qkv_projections() first"
            )
        self._refuse_groups("unfuse")
        self._follow()
        if not force and (merged := self._merged_by_peft()):
            raise RuntimeError(
                f"cannot unfuse: PEFT has merged {', '.join(merged)} into the same weights since; call "
                "pipe.unfuse_lora() first, or ether.unfuse(pipe, force=True), which restores the base without it"
            )
        wrapped = {projection.path for projection, _ in self._wrappers}
        for projection in self._projections.values():
            if projection.fused is not None:
                projection.fused.check(projection.module, projection.path, projection.path in wrapped, force)

    def unfuse(self, force: bool = False) -> None:
        """Put the base weights back, bit for bit, and let the hooks work again; raises as :meth:`check_unfuse` does."""
        self.check_unfuse(force)
        for projection, wrapper in self._wrappers:
            if projection.fused is not None and wrapper.merged_adapters:
                wrapper.unmerge()  # so that PEFT does not take it off a second time
        for projection in self._projections.values():
            projection.unfuse()
        self.fused = False
        self._plan()

    def _refuse_tied(self) -> None:
        """Raise ValueError if two projections with a plan share one weight, which would get both updates."""
        owners: dict[int, str] = {}
        for path, projection in self._projections.items():
            weight = plain_weight(projection.module)
            if isinstance(projection.plan, Off) or weight is None or weight.is_meta:
                continue
            if (other := owners.setdefault(weight.data_ptr(), path)) != path:
                raise ValueError(f"cannot fuse: {other} and {path} share one weight; use the adapter unfused")

    def _refuse_groups(self, wish: str) -> None:
        if grouped(self.model):
            raise ValueError(
                f"cannot {wish} under group offloading, which keeps weights elsewhere: do it before that, "
                "or in a pipeline that is loaded anew"
            )

    def updates(self, strengths: Mapping[str, float]) -> Iterator[tuple[str, nn.Module, Mixture]]:
        """What adapters at these strengths do to each projection: its canonical path, the projection, Σ s ΔW.

        Raises:
            RuntimeError: the weights are not the base's, since adapters are fused or PEFT has merged something.
        """
        self.refuse_if_fused("read the base's weights")
        self._follow()
        for path, projection in self._projections.items():
            here = [(projection.methods[n], s) for n, s in strengths.items() if s != 0.0 and n in projection.methods]
            if here:
                self.check_part(projection)
                yield path, projection.module, Mixture(tuple(here), self._generation)

    def base_weights(self) -> dict[str, Tensor]:
        """Weights of the base, by path, where an adapter is fused into the model's own."""
        return {path: each.fused.base for path, each in self._projections.items() if each.fused is not None}

    def refuse_if_fused(self, wish: str) -> None:
        """Raise RuntimeError if adapters are fused into the weights; ``wish`` says what was about to be done."""
        if self.fused:
            raise RuntimeError(f"cannot {wish} while adapters are fused into the weights: call unfuse first")

    def _plan(self) -> None:
        """Make the plans of all projections anew."""
        acts = self.enabled and not self.fused
        names = self.strengths.items() if acts else ()
        active = tuple(sorted((name, s, self.adapters[name].serial) for name, s in names if s != 0.0))
        content = (active, self.per_sample if acts else None, self.fused)
        self._generation = self._generations.of(content)
        for projection in self._projections.values():
            if not acts:
                projection.plan = Off(self._generation)
            elif self.per_sample is None:
                projection.plan = self._mixture(projection)
            else:
                projection.plan = self._samples(projection, self.per_sample)
        self.vectors_changed()
        self._slots = Slots([slot for projection in self._projections.values() for slot in projection.slot])

    def vectors_changed(self) -> None:
        """Say anew which projections compiled code may read beforehand, and what it reads."""
        for projection in self._projections.values():
            projection.set_buffered()

    def fill_buffers(self) -> None:
        """Have the buffers of all projections there that compiled code may read."""
        fill_missing(self._projections.values())

    def _mixture(self, projection: Projection) -> Plan:
        # in the order of attaching, whatever the order in which they were made active: sums round the same
        here = [(method, s) for name, method in projection.methods.items() if (s := self.strengths.get(name, 0.0)) != 0]
        return Mixture(tuple(here), self._generation) if here else Off(self._generation)

    def _samples(self, projection: Projection, samples: SampleNames) -> Plan:
        methods = [projection.methods[name] for name in samples.adapters if name in projection.methods]
        reflections = tuple(method for method in methods if isinstance(method, Reflection))  # all of them or none
        return PerSample(reflections, samples, self._generation) if reflections else Off(self._generation)

    def _follow(self) -> None:
        """Go on in the modules that have taken the places of projections, such as dequantised ones.

        Raises:
            RuntimeError: a module of another width, or none, is in a projection's place.
        """
        if self._links and all(children.get(name) is child for children, name, child in self._links):
            return
        with _FOLLOWING:
            self._follow_anew()

    def _follow_anew(self) -> None:
        for path, projection in self._projections.items():
            present = module_at(self.model, path)
            if present is projection.module:
                continue
            widths = [
                (getattr(m, "in_features", None), getattr(m, "out_features", None))
                for m in (projection.module, present)
            ]
            if present is None or widths[0] != widths[1]:
                raise RuntimeError(
                    f"the projection {path} was replaced by {type(present).__name__} after the adapter was attached, "
                    "which does not fit: unload the adapter and load it again"
                )
            projection.hook(present)
        self._links = links_to(self.model, self._projections)
        around = [(projection, wrapper_at(self.model, path)) for path, projection in self._projections.items()]
        self._wrappers = [(each, wrapper) for each, wrapper in around if hasattr(wrapper, "merged_adapters")]
        self._switches = [module for module in self.model.modules() if hasattr(module, "gradient_checkpointing")]

    def _merged_by_peft(self) -> list[str]:
        """The adapters that PEFT has merged into weights that an adapter acts on or is fused into, by name."""
        merged: dict[str, None] = {}
        for projection, wrapper in self._wrappers:
            if projection.fused is not None or not isinstance(projection.plan, Off):
                merged |= dict.fromkeys(wrapper.merged_adapters)
        return list(merged)

    def check_part(self, projection: Projection) -> None:
        """Raise RuntimeError if PEFT has merged an update into the weight of a projection that is called alone."""
        wrapper = wrapper_at(self.model, projection.path)
        if merged := getattr(wrapper, "merged_adapters", None):
            raise _merged_beneath(merged)

    def _begin(self, model: nn.Module, args: object) -> None:
        if not torch.compiler.is_compiling():
            self._follow()
            for projection in self._projections.values():
                projection.refresh_buffers()
            if not self.fused and (merged := self._merged_by_peft()):
                raise _merged_beneath(merged)
        open_forward(self, self._slots, forward_dtype(self._projections.values()))

    def _end(self, model: nn.Module, args: object, output: object) -> None:
        close_forward(self)
        refuse_switches(model, self._switches, output, lambda: self._generation)

    def _guard(self, attention: nn.Module, args: object) -> None:
        if has_fused_qkv(attention) and any(not isinstance(p.plan, Off) for p in self._projections.values()):
            raise RuntimeError(
                "fuse_qkv_projections() bypasses the projections that the adapter sits on: "
                "call unfuse_qkv_projections(), or ether.fuse(pipe) before fusing q, k, v"
            )


def _merged_beneath(merged: Sequence[str]) -> RuntimeError:
    return RuntimeError(
        f"PEFT has merged {', '.join(merged)} into weights that an adapter transforms; it would transform the merged "
        "update, too: call pipe.unfuse_lora(), or ether.fuse(pipe) before pipe.fuse_lora()"
    )


def forward_dtype(projections: Iterable[Projection]) -> torch.dtype:
    """The dtype in which a model's projections multiply: that of the first weight that can be read, else fp32."""
    weights = (plain_weight(projection.module) for projection in projections)
    weight = next((weight for weight in weights if weight is not None), None)
    return torch.float32 if weight is None else matmul_dtype(weight)


Link = tuple[dict[str, nn.Module | None], str, nn.Module | None]
"""The children of a module, the name of one of them, and who it is."""


def links_to(root: nn.Module, paths: Iterable[str]) -> list[Link]:
    """All that has to stay as it is for the modules at canonical paths to be the same ones."""
    found: dict[tuple[int, str], Link] = {}
    for path in paths:
        module: nn.Module | None = root
        for part in path.split("."):
            if module is None:
                break
            inside = unwrapped(module)
            found[id(inside), part] = (inside._modules, part, inside._modules.get(part))
            module = inside._modules.get(part)
        while module is not None and "base_layer" in module._modules:
            found[id(module), "base_layer"] = (module._modules, "base_layer", module._modules["base_layer"])
            module = module._modules["base_layer"]
    return list(found.values())


_FOLLOWING = threading.Lock()
"""Held while hooks move to the modules that took the places of others: threads may share a model."""
_ATTRIBUTE = "_ether_host"


def _in_tuner(module: nn.Module | None) -> bool:
    """Whether a layer of the ETHER tuner of PEFT is among the layers around a projection."""
    while module is not None and "base_layer" in module._modules:
        if "ether_methods" in module._modules:
            return True
        module = module._modules["base_layer"]
    return False


def host_of(model: nn.Module) -> Host | None:
    """The adapters attached to ``model``, None if there are none."""
    host: Host | None = root_of(model).__dict__.get(_ATTRIBUTE)
    return host


def attach(model: nn.Module, config: EtherConfig | None = None, name: str = "default") -> Adapter:
    """Attach a new adapter to a frozen model and make it active at strength 1.

    Args:
        model: UNet, ControlNet, transformer, text encoder: any module with attention projections. Its parameters
            are neither changed nor frozen; freeze them yourself before training.
        config: what to attach; the default is ETHER+ on every attention projection.
        name: by which the adapter is set, saved and removed.

    Raises:
        ValueError: n_blocks does not divide the features of a target, no projection matches, the name is taken, or
            the model's q, k, v projections are fused, or PEFT has an ETHER layer around a target.
    """
    config = config or EtherConfig()
    targets = find_targets(model, config.targets)
    check_blocks(targets, config)
    return attach_made(model, Adapter(config, targets, name), targets)


def attach_made(model: nn.Module, adapter: Adapter, targets: list[Target]) -> Adapter:
    """Attach an adapter that was made for these targets of the model, on the model's device, active at strength 1.

    Raises:
        ValueError: the name is empty or taken, or the model's q, k, v projections are fused.
    """
    root, host, name = root_of(model), host_of(model), adapter.adapter_name
    if not name:
        raise ValueError("an adapter needs a name: it is empty")
    if host is not None and name in host.adapters:
        raise ValueError(f"an adapter {name!r} is attached already: detach it, or choose another name")
    if any(has_fused_qkv(target.attention) for target in targets):
        raise ValueError("the model's q, k, v projections are fused: call unfuse_qkv_projections() before attaching")
    for target in targets:
        if _in_tuner(wrapper_at(root, target.path)):
            raise ValueError(
                f"PEFT has an ETHER layer around {target.path}, which an adapter beside it would not see: unload it, "
                "or add this adapter by PEFT, too (ether_diffusion.peft_tuner.to_peft makes its folder)"
            )
    device = getattr(getattr(targets[0].module, "weight", None), "device", torch.device("cpu"))
    if device.type != "meta":
        adapter.to(device)
    if host is None:
        host = Host(root)
    host.add(adapter, targets)
    root.__dict__[_ATTRIBUTE] = host
    return adapter
