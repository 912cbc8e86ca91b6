"""The layer that PEFT puts in a Linear's place: it owns the vectors, and the core's projection does the arithmetic."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ether_diffusion.core.adapter import check_blocks
from ether_diffusion.core.fused import FusedWeight
from ether_diffusion.core.layout import Layout
from ether_diffusion.core.linear import Projection, given_input, with_input
from ether_diffusion.core.methods import Reflection, build_method
from ether_diffusion.core.plan import Generations, Mixture, Off, PerSample, Plan, SampleNames
from ether_diffusion.core.targets import Target, canonical
from ether_diffusion.core.weights import writable_weight
from ether_diffusion.peft_tuner.config import EtherPeftConfig
from ether_diffusion.peft_tuner.forwards import Forwards, bring_back, names_of

BASE = "__base__"
"""PEFT's name for no adapter in a mixed batch."""
_SERIALS = itertools.count()


class EtherLinear(nn.Module, BaseTunerLayer):
    """y = H⁺_out (weight (H⁺ x)) + bias, y = weight (H x) + bias or a variant, around a frozen Linear.

    Several active adapters add their updates: weight + Σ s ΔW, as in ``ether.set_adapters``. The vectors are fp32
    whatever the model is cast to. ``ether_methods`` holds them by adapter; their keys in a file are
    ``<path>.ether_methods.u`` and so on.

    Args:
        base_layer: the Linear, quantised or not, or another tuner's layer around it.
        path: its path in the model.
        forwards: of the model.
        inputs: the layout of the input side.
        outputs: likewise of the output side.

    Attributes:
        projection: the core's, which applies the plan.
    """

    adapter_layer_names = ("ether_methods",)
    other_param_names = ("ether_scales", "ether_serials")

    def __init__(self, base_layer: nn.Module, path: str, forwards: Forwards, inputs: Layout, outputs: Layout) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = inputs.features, outputs.features
        self.inputs, self.outputs = inputs, outputs
        self.ether_methods = nn.ModuleDict()
        self.ether_scales: dict[str, tuple[float, ...]] = {}
        self.ether_serials: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # what PEFT's helper switches; nothing is cast here either way
        self.forwards = forwards
        self.projection = Projection(canonical(path), base_layer, forwards, hooked=False)
        self._generations = Generations()
        self.register_load_state_dict_post_hook(_loaded)

    def update_layer(self, adapter_name: str, config: EtherPeftConfig, generator: torch.Generator) -> None:
        """Add an adapter.

        Raises:
            ValueError: ``n_blocks`` does not divide the features, or leaves blocks of width 1.
        """
        target = self.target(config)
        check(target, config)
        method = build_method(config.ether_config(), target.inputs, target.outputs, generator)
        assert isinstance(method, Reflection)
        if not config.init_weights:
            _draw_apart(method, generator)
        self.ether_methods[adapter_name] = method
        self.ether_scales[adapter_name] = (1.0,)
        self.ether_serials[adapter_name] = next(_SERIALS)
        self.projection.put(adapter_name, method)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self._active(), inference_mode=config.inference_mode)

    def linear(self) -> nn.Module:
        """The Linear, whatever other tuners have put around it."""
        found: nn.Module = BaseTunerLayer.get_base_layer(self)
        return found

    def method(self, adapter: str) -> Reflection:
        """The transform of an adapter that is here."""
        found = self.ether_methods[adapter]
        assert isinstance(found, Reflection)
        return found

    def target(self, config: EtherPeftConfig) -> Target:
        """What an adapter with these settings acts on."""
        left_out = config.exclude_parts or ()
        inputs, outputs = self.inputs.without(left_out), self.outputs.without(left_out)
        return Target(self.projection.path, self.base_layer, inputs, outputs)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The transformed projection.

        Args:
            args: the input (..., in_features), by position or by name.
            adapter_names: the adapter of each sample, "__base__" for none; None: the active ones for all.
            kwargs: see ``args``.

        Returns:
            (..., out_features).

        Raises:
            ValueError: as many names as samples are needed, and no adapter may be merged.
        """
        projection = self.projection
        if projection.module is not self.base_layer:  # replaced, as by a quantised one
            projection.module = self.base_layer
        if not torch.compiler.is_compiling():
            bring_back(projection)
        names = adapter_names or names_of(self.forwards, len(given_input(args, kwargs)))
        if names is None or self._disable_adapters:
            return projection.run(projection.plan, *args, **kwargs)
        return self._mixed(tuple(names), args, kwargs)

    def _mixed(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Each sample under its own adapter; those of one kind, and the base, share one call."""
        x = given_input(args, kwargs)
        if len(x) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        groups: dict[object, list[int]] = {}
        for sample, name in enumerate(names):
            groups.setdefault(self._kind(name), []).append(sample)
        if len(groups) > 1 and None in groups:
            base = groups.pop(None)
            alike = next((kind for kind in groups if not isinstance(kind, str)), None)
            groups[alike] = sorted([*groups.get(alike, []), *base])
        if len(groups) == 1:
            return self.projection.run(self._plan_of(names), *args, **kwargs)
        parts, order = [], []
        for samples in groups.values():
            index = torch.tensor(samples, device=x.device)
            own_args, own_kwargs = with_input(args, kwargs, x.index_select(0, index))
            plan = self._plan_of(tuple([names[sample] for sample in samples]))
            parts.append(self.projection.run(plan, *own_args, **own_kwargs))
            order += samples
        back = torch.tensor(order, device=x.device).argsort()
        return torch.cat(parts).index_select(0, back)

    def _kind(self, name: str) -> object:
        """What samples must share to be in one call: None for the base, the name of a scaled adapter, else the variant
        and its shapes.
        """
        if name not in self.ether_methods or (strength := self.strength(name)) == 0.0:
            return None
        if strength != 1.0:
            return name
        method = self.method(name)
        return type(method), *[(key, vector.shape) for key, vector in method.named_parameters()]

    def _plan_of(self, names: tuple[str, ...]) -> Plan:
        """The plan of samples of one kind, and of the base."""
        own = tuple([name if self._kind(name) is not None else None for name in names])
        samples = SampleNames(own)
        if not samples.adapters:
            return Off()
        first = samples.adapters[0]
        if isinstance(self._kind(first), str):
            return self._mixture([first])
        return PerSample(tuple([self.method(name) for name in samples.adapters]), samples, 0)

    def _mixture(self, names: Sequence[str], generation: int = 0) -> Mixture:
        """Adapters at their strengths, without those of strength 0."""
        strengths = {name: self.strength(name) for name in names}
        parts = tuple([(self.method(name), strength) for name, strength in strengths.items() if strength != 0.0])
        return Mixture(parts, generation)

    def _replan(self) -> None:
        """Decide anew what acts."""
        here = [] if self._disable_adapters or self.merged else self._active_here()
        content = tuple([(self.ether_serials[name], self.strength(name)) for name in here])
        generation = self._generations.of((content, tuple(self.merged_adapters)))
        mixture = self._mixture(here, generation)
        self.projection.plan = mixture if mixture.parts else Off(generation)
        self.projection.set_buffered()
        self.forwards.changed()

    # PEFT's verbs

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active, and trainable unless ``inference_mode``; names that are not here, too."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._replan()

    def enable_adapters(self, enabled: bool) -> None:
        """Turn all adapters on or off; merged ones are unmerged before they are turned off."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        self._replan()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train vectors, or leave them as they are."""
        super().set_requires_grad(adapter_names, requires_grad)
        self.projection.set_buffered()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; see PEFT for which one is active then."""
        super().delete_adapter(adapter_name)
        self.projection.methods.pop(adapter_name, None)
        self._replan()

    def strength(self, adapter: str) -> float:
        """The factor of an adapter's update."""
        return math.prod(self.ether_scales[adapter])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Give an adapter a strength: weight + s ΔW. An adapter that is not here is passed over, as in PEFT.

        Raises:
            ValueError: the strength is not finite.
        """
        if adapter in self.ether_scales:
            self.ether_scales[adapter] = (_finite(scale),)
            self._warn_if_merged([adapter])
            self._replan()

    def scale_layer(self, scale: float) -> None:
        """Multiply the strengths of the active adapters, until :meth:`unscale_layer` with the same number."""
        if _finite(scale) != 1:
            for name in self._active_here():
                self.ether_scales[name] = (*self.ether_scales[name], scale)
            self._warn_if_merged(self._active_here())
            self._replan()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Take a factor of :meth:`scale_layer` off again, 0 among them; None sets the strengths to 1.

        Raises:
            ValueError: 0 that no call of :meth:`scale_layer` has put on.
        """
        if scale == 1:
            return
        for name in self._active_here():
            self.ether_scales[name] = (1.0,) if scale is None else _without(self.ether_scales[name], scale)
        self._replan()

    def _warn_if_merged(self, names: list[str]) -> None:
        if merged := [name for name in names if name in self.merged_adapters]:
            warnings.warn(f"{merged[0]} is merged: its new scale holds from the next merge on", stacklevel=3)

    def _active_here(self) -> list[str]:
        """In the order in which they were added, whatever the order of activation: sums round the same."""
        active = self._active()
        return [name for name in self.ether_methods if name in active]

    def _active(self) -> list[str]:
        names = self._active_adapter
        return [names] if isinstance(names, str) else names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the weight: weight + Σ s ΔW; :meth:`unmerge` restores it bit for bit.

        Args:
            safe_merge: whether to refuse a weight that is not finite.
            adapter_names: None: the active ones.

        Raises:
            ValueError: the weight is quantised, sharded or offloaded, belongs to another tuner's layer, or is not
                finite under ``safe_merge``; it stays as it is.
            RuntimeError: something else has changed the weight since the last merge.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.ether_methods]
        if not names:
            return
        module = self.foldable("merge into")
        earlier = self.projection.fused
        if earlier is not None:
            self._restore()
        merged = [*self.merged_adapters, *names]
        self.projection.fused = FusedWeight.fold(module, self._mixture(merged))
        weight = module.weight
        if safe_merge and isinstance(weight, Tensor) and not weight.isfinite().all():
            self.projection.unfuse()
            if earlier is not None:
                self.projection.fused = FusedWeight.fold(module, earlier.plan)
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        self.merged_adapters = merged
        self._replan()

    def unmerge(self) -> None:
        """Put the weight back, bit for bit.

        Raises:
            RuntimeError: something else has changed the weight since the merge.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self.merged_adapters = []
        self._replan()

    def _restore(self) -> None:
        fused, module = self.projection.fused, self.foldable("unmerge")
        assert fused is not None
        fused.check(module, self.projection.path, wrapped=False, way_out="load the base again")
        self.projection.unfuse()

    def foldable(self, wish: str) -> nn.Module:
        """The Linear, if its weight can be changed in place and no other tuner is around it.

        Args:
            wish: what is to be done, for the error.

        Raises:
            ValueError: it is quantised, sharded or offloaded, or another tuner has a layer around it.
        """
        self.projection.module = self.base_layer
        if isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                f"cannot {wish} {self.projection.path}: {type(self.base_layer).__module__} has a layer between ETHER "
                "and the weight; delete that adapter first, or use both unmerged"
            )
        writable_weight(self.base_layer, wish)
        return self.base_layer

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s ΔW of an adapter, (out_features, in_features) in fp32 at least; of rank n (ETHER), 2n or 4n (ETHER+)."""
        fused = self.projection.fused
        weight = dequantize_module_weight(self.linear()) if fused is None else fused.base
        if adapter not in self.ether_methods:
            return torch.zeros(weight.shape, device=weight.device)
        method = self.method(adapter)
        return self.strength(adapter) * method.delta_weight(weight.to(next(method.parameters()).device))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``convert_to_lora`` can be called: W' - W is exactly of rank n (ETHER), 2n or 4n (ETHER+)."""
        return not isinstance(self.base_layer, BaseTunerLayer)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the vectors to the weight's device; their dtype stays fp32, where PEFT's own would take the weight's."""
        if adapter_name not in self.ether_methods:
            return
        method = self.method(adapter_name)
        weight = getattr(self.linear(), "weight", None)
        device = device or getattr(weight, "device", None)
        on_meta = any(vector.is_meta for vector in method.parameters())
        if device is not None and device.type != "meta" and not on_meta:
            method.to(device)

    def __repr__(self) -> str:
        return f"ether.{super().__repr__()}"


def _loaded(layer: nn.Module, _: object) -> None:
    """Let compiled code, which may read what was made of the vectors beforehand, see those that were loaded."""
    assert isinstance(layer, EtherLinear)
    layer.projection.set_buffered()


def check(target: Target, config: EtherPeftConfig) -> None:
    """Raise ValueError unless the blocks of an adapter fit a projection, two features wide at least."""
    check_all([target], config)


def check_all(targets: list[Target], config: EtherPeftConfig) -> None:
    """Raise ValueError unless the blocks of an adapter fit all its projections, two features wide at least."""
    settings = config.ether_config()
    check_blocks(targets, settings)
    for target in targets:
        for side in (target.inputs, target.outputs)[: 1 + settings.acts_on_outputs]:
            for part in side.parts:
                if part.width == config.n_blocks:
                    raise ValueError(
                        f"n_blocks={config.n_blocks} cuts the {part.width} features of {target.path} into blocks of "
                        "width 1, which have no direction that could be trained: give fewer blocks"
                    )


def _draw_apart(method: Reflection, generator: torch.Generator) -> None:
    """Random v, or u₀, where it starts as u."""
    with torch.no_grad():
        for pairs in method.vectors():
            for _, v in pairs:
                if v is not None and not v.is_meta:
                    drawn = torch.randn(v.shape, generator=generator, dtype=torch.float32)
                    v.copy_(torch.nn.functional.normalize(drawn, dim=-1))


def _finite(scale: float) -> float:
    if not math.isfinite(scale):
        raise ValueError(f"a strength must be a finite number, not {scale}")
    return scale


def _without(factors: tuple[float, ...], scale: float) -> tuple[float, ...]:
    """Factors without the last one that is ``scale``, or divided by it."""
    first, *rest = factors
    if scale in rest:
        place = len(rest) - 1 - rest[::-1].index(scale)
        return (first, *rest[:place], *rest[place + 1 :])
    if scale == 0:
        raise ValueError("unscale_layer(0): no scale_layer(0) is in force, and nothing can be divided by 0")
    return (first, *rest, 1 / _finite(scale))
