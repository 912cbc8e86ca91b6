"""Attach adapters to a frozen model, and turn them on, off, up, down, or into the weights."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.functional import matmul_dtype
from ether_diffusion.core.linear import Injection, plain_weight
from ether_diffusion.core.methods import Method, build_method
from ether_diffusion.core.per_sample import PerSample, check_mixable
from ether_diffusion.core.rows import SharedRows, Slot
from ether_diffusion.core.state import StateMismatchError, state_problems
from ether_diffusion.core.targets import Target, find_targets, has_fused_qkv, root_of


class Adapter(nn.Module):
    """The vectors of one adapter, beside the model that they act on.

    A plain module: ``parameters()`` are fp32, ``state_dict()`` has the keys ``<module path>.u`` and so on. It is not
    registered in the model, whose own parameters, state dict and dtype stay as they are.
    """

    def __init__(self, config: EtherConfig, targets: list[Target], name: str) -> None:
        super().__init__()
        self.config = config
        self.adapter_name = name
        self.host: Host | None = None
        generator = torch.Generator().manual_seed(config.seed)
        for target in targets:
            method = build_method(config, target.in_features, target.out_features, generator)
            _set_submodule(self, target.path, method)
        self._scalars = sum(parameter.numel() for parameter in self.parameters())

    def methods(self) -> dict[str, Method]:
        """The transform of every target, by module path."""
        return {path: module for path, module in self.named_modules() if isinstance(module, Method)}

    def num_parameters(self) -> int:
        """Number of trained scalars."""
        return self._scalars

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load vectors after checking all of them; nothing changes if one does not fit.

        Raises:
            StateMismatchError: unknown or missing keys, wrong shapes, values that are not finite, zero vectors.
        """
        if problems := state_problems(state_dict, self.state_dict()):
            raise StateMismatchError(self.adapter_name, problems)
        state = {key: value.float() for key, value in state_dict.items()}
        return super().load_state_dict(state, strict=True, assign=assign)

    def detach(self) -> None:
        """Take the adapter off its model, which is left as if it had never been there."""
        if self.host is not None:
            self.host.remove(self.adapter_name)


class Host:
    """All adapters of one model: which are there, which are active at which strength, whether they are fused."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.strengths: dict[str, float] = {}
        self.enabled = True
        self.fused = False
        self.per_sample: PerSample | None = None
        self._injections: dict[str, Injection] = {}
        self._guards: dict[nn.Module, Any] = {}
        self._shared = SharedRows()
        self._slots: list[Slot] = []
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def add(self, adapter: Adapter, targets: list[Target]) -> None:
        """Put an adapter on its targets; it is active at strength 1, unless each sample has an adapter of its own."""
        self.refuse_if_fused("attach another adapter")
        methods = adapter.methods()
        for target in targets:
            injection = self._injections.get(target.path)
            if injection is None:
                injection = self._injections[target.path] = Injection(target.path, target.module, self._shared)
            injection.methods[adapter.adapter_name] = methods[target.path]
            if target.attention is not None and target.attention not in self._guards:
                guard = target.attention.register_forward_pre_hook(self._refuse_fused_qkv)
                self._guards[target.attention] = guard
        self.adapters[adapter.adapter_name] = adapter
        adapter.host = self
        forget_compiled_code()
        if self.per_sample is None:
            self.set_active({**self.strengths, adapter.adapter_name: 1.0})
        else:
            self._refresh()

    def remove(self, name: str) -> None:
        """Take an adapter off; the last one takes all hooks with it. None is active if samples had this one."""
        self.refuse_if_fused(f"remove {name!r}")
        adapter = self.adapters.pop(name)
        adapter.host = None
        for path in [path for path, injection in self._injections.items() if name in injection.methods]:
            injection = self._injections[path]
            del injection.methods[name]
            if not injection.methods:
                injection.remove()
                del self._injections[path]
        forget_compiled_code()
        if self.per_sample is None:
            self.set_active({key: strength for key, strength in self.strengths.items() if key != name})
        elif name in self.per_sample.adapters:
            self.set_active({})  # no sample goes on with another adapter unasked
        else:
            self._refresh()
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
        self._refresh()

    def set_per_sample(self, names: Sequence[str | None]) -> None:
        """Give each sample of a batch an adapter of its own, at strength 1; None is the base.

        Sample i of a forward has entry i modulo the number of entries. Gradients reach each adapter's own vectors.

        Raises:
            ValueError: no name, a name that is not attached, adapters of different settings, or of the method Naive.
            RuntimeError: the adapters are fused.
        """
        self.refuse_if_fused("change which adapters are active")
        per_sample = PerSample(names)
        if unknown := [name for name in per_sample.adapters if name not in self.adapters]:
            raise ValueError(f"no adapter {unknown[0]!r} here; there are: {', '.join(self.adapters) or 'none'}")
        check_mixable({name: self.adapters[name].config for name in per_sample.adapters})
        self.strengths = dict.fromkeys(per_sample.adapters, 1.0)
        self.per_sample = per_sample if per_sample.adapters else None
        self._refresh()

    def enable(self, enabled: bool = True) -> None:
        """Turn all adapters on or off, remembering strengths."""
        if enabled != self.enabled:
            self.refuse_if_fused("turn adapters on or off")
            self.enabled = enabled
            self._refresh()

    def fuse(self) -> None:
        """Fold the active adapters into the weights; :meth:`unfuse` restores the base bit for bit.

        Raises:
            ValueError: a weight is quantised or offloaded, or q, k, v are fused; no weight has been changed.
        """
        self.refuse_if_fused("fuse again")
        if self.per_sample is not None:
            raise ValueError("each sample has an adapter of its own, which no weight can hold: call set_adapters first")
        if any(has_fused_qkv(attention) for attention in self._guards):
            raise ValueError("the q, k, v projections are fused: call unfuse_qkv_projections() before fusing adapters")
        done: list[Injection] = []
        try:
            for injection in self._injections.values():
                if injection.active:
                    injection.fuse()
                    done.append(injection)
        except Exception:
            for injection in done:
                injection.unfuse()
            raise
        self.fused = True

    def unfuse(self) -> None:
        """Put the base weights back and let the hooks work again."""
        if any(has_fused_qkv(attention) for attention in self._guards):
            raise RuntimeError(
                "the q, k, v projections were fused after the adapter: call unfuse_qkv_projections() first"
            )
        for injection in self._injections.values():
            injection.unfuse()
        self.fused = False

    def base_weights(self) -> dict[str, Tensor]:
        """Weights of the base, by path, where an adapter is fused into the model's own."""
        return {p: i.base_weight for p, i in self._injections.items() if i.base_weight is not None}

    def _refresh(self) -> None:
        for injection in self._injections.values():
            if not self.enabled:
                injection.activate({})
            elif self.per_sample is None:
                injection.activate(self.strengths)
            else:
                injection.activate_per_sample(self.per_sample)
        self._slots = [injection.slot for injection in self._injections.values() if injection.slot is not None]

    def _begin(self, model: nn.Module, args: object) -> None:
        slots = [] if self.fused else self._slots
        weights = (plain_weight(injection.module) for injection in self._injections.values())
        weight = next((weight for weight in weights if weight is not None), None)
        self._shared.open(slots, torch.float32 if weight is None else matmul_dtype(weight))

    def _end(self, model: nn.Module, args: object, output: object) -> None:
        self._shared.close()

    def refuse_if_fused(self, wish: str) -> None:
        """Raise RuntimeError if adapters are fused into the weights; ``wish`` says what was about to be done."""
        if self.fused:
            raise RuntimeError(f"cannot {wish} while adapters are fused into the weights: call unfuse first")

    def _refuse_fused_qkv(self, attention: nn.Module, args: object) -> None:
        if has_fused_qkv(attention) and not self.fused and self.enabled and self.strengths:
            raise RuntimeError(
                "fuse_qkv_projections() bypasses the projections that the adapter sits on: "
                "call unfuse_qkv_projections(), or ether.fuse(pipe) before fusing q, k, v"
            )


_ATTRIBUTE = "_ether_host"


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
            the model's q, k, v projections are fused.
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
    device = getattr(getattr(targets[0].module, "weight", None), "device", torch.device("cpu"))
    if device.type != "meta":
        adapter.to(device)
    if host is None:
        host = Host(root)
    host.add(adapter, targets)
    root.__dict__[_ATTRIBUTE] = host
    return adapter


def check_blocks(targets: list[Target], config: EtherConfig) -> None:
    """Raise ValueError unless ``config.n_blocks`` divides every width that the adapter transforms."""
    two_sided = config.method == "ether_plus" and config.two_sided
    widths = {
        (t.path, w) for t in targets for w in ((t.in_features, t.out_features) if two_sided else (t.in_features,))
    }
    for path, width in sorted(widths):
        if width % config.n_blocks:
            shared = math.gcd(*(width for _, width in widths))
            divisors = [n for n in range(1, shared + 1) if shared % n == 0]
            raise ValueError(
                f"n_blocks={config.n_blocks} does not divide the {width} features of {path}; "
                f"all targets share these divisors: {', '.join(map(str, divisors))}"
            )


def _set_submodule(module: nn.Module, path: str, child: nn.Module) -> None:
    """Register ``child`` under a dotted path, with plain modules on the way, so that keys are the model's own paths."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module._modules[parent]  # type: ignore[assignment]
    module.add_module(name, child)


def forget_compiled_code() -> None:
    """Let torch.compile trace again: it does not guard on hooks, so code compiled without them would skip them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
