"""The tuner: which modules get an ETHER layer, and PEFT's verbs on all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ether_diffusion.core.host import host_of
from ether_diffusion.core.layout import INPUT_PARTS, OUTPUT_PARTS, Layout
from ether_diffusion.core.state import StateMismatchError, state_problems
from ether_diffusion.core.targets import Target, canonical, fused_layouts, unwrapped
from ether_diffusion.peft_tuner.config import EtherPeftConfig
from ether_diffusion.peft_tuner.forwards import Forwards, mixed_batch, names_of
from ether_diffusion.peft_tuner.layer import BASE, EtherLinear, check_all
from ether_diffusion.peft_tuner.registration import PREFIX
from ether_diffusion.pipelines.schema import VECTOR_PARTS

NESTED = "text_model."
"""Where some text encoders keep their layers; the canonical paths of adapter files leave it out."""
VECTOR_NAMES = {"ether_methods", *VECTOR_PARTS, *INPUT_PARTS, *OUTPUT_PARTS} - {"blocks"}
"""Names in the keys of vectors."""
Layouts = dict[str, tuple[Layout, Layout]]


class EtherModel(BaseTuner):
    """A model whose targeted Linears are :class:`EtherLinear`; made by ``get_peft_model`` and ``add_adapter``.

    Raises:
        ValueError: a target is no Linear, ``n_blocks`` does not fit its features, or ``ether.attach`` has put an
            adapter on the same model.
    """

    prefix = PREFIX
    tuner_layer_cls = EtherLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter on its targets; one that is refused leaves no settings behind.

        Raises:
            ValueError: see the class; or a name that is part of another one's keys.
        """
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            known = any(adapter_name in each.ether_methods for each in model.modules() if isinstance(each, EtherLinear))
            if not known:
                self.peft_config.pop(adapter_name, None)
            raise

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """Raise ValueError for a name under which PEFT would not save all vectors of the other adapters.

        It takes every key with that name between dots for one of that adapter.
        """
        super()._check_new_adapter_config(config)
        if len(self.peft_config) == 1:
            return
        with_adapters = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        tuned = tuple([f"{path}." for path, each in self.model.named_modules() if isinstance(each, with_adapters)])
        paths = [path for path, _ in self.model.named_modules() if not path.startswith(tuned)]
        parts = {part for path in paths for part in path.split(".")} | VECTOR_NAMES
        for name in self.peft_config:
            if name in parts:
                raise ValueError(
                    f"the adapter name {name!r} is also part of a name in this model: PEFT would leave out vectors of "
                    "the other adapters when it saves them; give it another name"
                )

    def _prepare_model(self, peft_config: EtherPeftConfig, model: nn.Module) -> None:
        """Check all targets before any is replaced."""
        if host_of(model) is not None:
            raise ValueError(
                "ether.attach has put an adapter on this model: detach it first, for two of them around one weight "
                "would be one transform of the other"
            )
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        layouts = self.__dict__["_layouts"] = fused_layouts(unwrapped(model))
        inside = tuple([f"{path}." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)])
        targets = []
        for path, module in model.named_modules():
            if path and not path.startswith(inside) and self._check_target_module_exists(peft_config, path):
                refuse_other(path, module, model)
                inputs, outputs = _layout(path, module, layouts)
                left_out = peft_config.exclude_parts or ()
                targets.append(Target(path, module, inputs.without(left_out), outputs.without(left_out)))
        check_all(targets, peft_config)

    def _create_and_replace(
        self,
        peft_config: EtherPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            raise ValueError(
                f"{current_key} is a parameter, which is not supported: ETHER acts on modules of torch.nn.Linear"
            )
        refuse_other(current_key, target, self.model)
        generator = self._generator(adapter_name, peft_config)
        if isinstance(target, EtherLinear):
            target.update_layer(adapter_name, peft_config, generator)
            return
        layouts = _layout(current_key, target, self.__dict__["_layouts"])
        layer = EtherLinear(target, current_key, Forwards.of(self.model), *layouts)
        layer._active_adapter = [adapter_name]
        layer.update_layer(adapter_name, peft_config, generator)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _generator(self, adapter_name: str, peft_config: EtherPeftConfig) -> torch.Generator:
        """One generator for all projections of an adapter; torch's global one if there is no seed."""
        if peft_config.seed is None:
            return torch.default_generator
        found: dict[str, torch.Generator] = self.__dict__.setdefault("_generators", {})
        if adapter_name not in found:
            found[adapter_name] = torch.Generator().manual_seed(peft_config.seed)
        return found[adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from all layers."""
        super().delete_adapter(adapter_name)
        self.__dict__.get("_generators", {}).pop(adapter_name, None)

    def add_weighted_adapter(self, *args: object, **kwargs: object) -> None:
        """Refused: the sum of two ETHER adapters is no ETHER adapter.

        Raises:
            ValueError: always, with what to do.
        """
        raise ValueError(
            "a weighted sum of ETHER adapters is no ETHER adapter: make several active by "
            "model.base_model.set_adapter([...]) and give each a strength by set_scale, or convert them to LoRA first"
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing is cast: the vectors are fp32, for in half precision v - u would be rounded away."""
        if not autocast_adapter_dtype:
            warnings.warn("autocast_adapter_dtype=False: the vectors of ETHER stay fp32 all the same", stacklevel=2)

    def _check_merge_allowed(self) -> None:
        """Raise what would keep one layer from being merged, before the first is.

        Raises:
            ValueError: a weight is quantised or sharded, or is also another module's, which would get the update, too.
        """
        super()._check_merge_allowed()
        owners: dict[int, list[str]] = {}
        for path, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(path)
        for path, module in self.model.named_modules():
            if isinstance(module, EtherLinear):
                weight = getattr(module.linear(), "weight", None)
                if weight is not None and not weight.is_meta:  # PEFT brings back what is offloaded, layer by layer
                    module.foldable("merge into")
                others = [other for other in owners.get(id(weight), []) if not other.startswith(f"{path}.base_layer")]
                if others:
                    raise ValueError(
                        f"cannot merge into {path}: its weight is also that of {others[0]}, which would change, too; "
                        "use the adapter unmerged, or untie the weights"
                    )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        if not any(isinstance(module, EtherLinear) for module in model.modules()):
            Forwards.of(model).remove()
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """A mixed batch, where ``adapter_names`` is given: each sample has the adapter that is named for it."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for each in self.modules() if isinstance(each, EtherLinear) for name in each.ether_methods}
        if unknown := sorted({name for name in names if name != BASE} - known):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        forwards = Forwards.of(self.model)
        with ExitStack() as stack:
            stack.enter_context(mixed_batch(forwards, names, beams if isinstance(beams, int) else 1))
            for module in self.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    handle = module.register_forward_pre_hook(_named_for(forwards), with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """``….ether_methods.<adapter>.u`` to ``….ether_methods.u``, whatever follows."""
        before, found, after = key.rpartition(f".ether_methods.{adapter_name}.")
        return f"{before}.ether_methods.{after}" if found else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The keys of the model, after a check of all vectors; those are fp32 whatever the file has.

        Raises:
            StateMismatchError: unknown or missing keys, wrong shapes, values that are not finite, zero vectors.
        """
        own = f".ether_methods.{adapter_name}."
        expected = {key: value for key, value in model.state_dict().items() if own in key}
        keys = {cls._remove_adapter_name_from_key(key, adapter_name) for key in expected}
        nested = {key.replace(NESTED, "", 1): key for key in keys if f".{NESTED}" in key or key.startswith(NESTED)}
        state_dict = {nested.get(key, key) if key not in keys else key: value for key, value in state_dict.items()}
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        given = {key: value for key, value in found.items() if ".ether_methods." in key}
        if problems := state_problems(given, expected):
            raise StateMismatchError(adapter_name, problems)
        return found | {key: value.to(torch.promote_types(value.dtype, torch.float32)) for key, value in given.items()}


def _layout(path: str, module: nn.Module, layouts: Layouts) -> tuple[Layout, Layout]:
    """The sides of a target: parts of a fused Linear, else wholes."""
    whole = Layout.whole(int(module.in_features)), Layout.whole(int(module.out_features))  # type: ignore[arg-type]
    return layouts.get(canonical(path), whole)


def refuse_other(path: str, module: nn.Module, model: nn.Module) -> None:
    """Raise ValueError unless a target is a Linear that its model calls."""
    base: nn.Module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    parent = path.rpartition(".")[0]
    if not isinstance(base, nn.Linear):
        raise ValueError(
            f"Target module {path} is of {type(base).__module__}.{type(base).__name__}, which is not supported: ETHER "
            "acts on torch.nn.Linear and its quantised subclasses; leave it out by target_modules or exclude_modules"
        )
    if parent and isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        raise ValueError(
            f"Target module {path} is not supported: torch.nn.MultiheadAttention reads its weight past the layer"
        )


def _named_for(forwards: Forwards) -> Any:
    """A hook that tells PEFT's own wrappers (``modules_to_save``) the names of the batch that this thread is in."""

    def tell(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = names_of(forwards, len(args[0])) if args else None
        return args, kwargs if names is None else {**kwargs, "adapter_names": list(names)}

    return tell
