"""Where the attention projections of a UNet, ControlNet, transformer or text encoder are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ether_diffusion.config import suggestion
from ether_diffusion.private import WRAPPERS, has_fused_processor

PRESETS = ("attention", "self_attention", "cross_attention", "attention+geglu")

DIFFUSERS_PROJECTIONS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
FUSED_PROJECTIONS = ("to_qkv", "to_kv", "to_added_qkv")
TRANSFORMERS_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Target:
    """One frozen projection that an adapter acts on.

    Attributes:
        path: canonical module path, the key in the adapter file; the same whatever version of transformers or
            wrapper (LoRA, torch.compile) stands around the module.
        module: the Linear itself (or a quantised stand-in with ``in_features`` and ``out_features``).
        attention: the attention module that calls it, None for projections outside attention.
    """

    path: str
    module: nn.Module
    attention: nn.Module | None = None

    @property
    def in_features(self) -> int:
        """Width of the projection's input."""
        return int(self.module.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Width of the projection's output."""
        return int(self.module.out_features)  # type: ignore[arg-type]


def root_of(model: nn.Module) -> nn.Module:
    """The module that canonical paths start from.

    Looks through ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``, and through the ``text_model``
    that some text encoders nest their layers in (all of them before transformers 5.6, those with a projection still),
    so that all give ``encoder.layers.0…``.
    """
    root = unwrapped(model)
    if hasattr(root, "text_model") and not hasattr(root, "vision_model"):
        root = unwrapped(root.get_submodule("text_model"))
    return root


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers that do not change what it computes."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
            continue
        inside = next((module._modules[name] for name in WRAPPERS if module._modules.get(name) is not None), None)
        if inside is None:
            return module
        module = inside


def canonical(path: str) -> str:
    """A module's path without the names of wrappers."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def wrapper_at(root: nn.Module, path: str) -> nn.Module | None:
    """What stands at a canonical path: the projection, or PEFT's layer around it; None where there is nothing."""
    module: nn.Module | None = root
    for part in path.split("."):
        module = None if module is None else unwrapped(module)._modules.get(part)
    return module


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    """The projection at a canonical path, inside of PEFT's layer and of wrappers; None where there is nothing."""
    module = wrapper_at(root, path)
    return None if module is None else _base_layer(unwrapped(module))


def find_targets(model: nn.Module, targets: str | tuple[str, ...] = "attention") -> list[Target]:
    """The projections of ``model`` that ``targets`` names, in the order of the model's modules.

    Args:
        model: a UNet, ControlNet, transformer or text encoder.
        targets: "attention" (q, k, v and out of every attention), "self_attention", "cross_attention",
            "attention+geglu" (also the projection of every GEGLU, the paper's setting for controls), or patterns.
            A pattern is a glob over the path of any Linear of the model; it may leave out the path's beginning:
            "to_q", "attn2.to_?", "mid_block.*".

    Raises:
        ValueError: the preset is unknown, the model has no such projection, or a pattern matches nothing.
    """
    root = root_of(model)
    if not isinstance(targets, str):
        return _matching(root, targets)
    if targets not in PRESETS:
        hint = suggestion(targets, PRESETS) or f'; for a name pattern pass a list: ["{targets}"]'
        raise ValueError(f"unknown targets {targets!r}{hint}; the presets are {', '.join(PRESETS)}")
    found = list(_attention_targets(root))
    if targets in ("self_attention", "cross_attention"):
        wanted = targets == "cross_attention"
        found = [target for target in found if bool(getattr(target.attention, "is_cross_attention", False)) == wanted]
    if targets == "attention+geglu":
        geglu = _diffusers_class("activations", "GEGLU")
        found += [
            Target(canonical(f"{path}.proj"), _base_layer(m.get_submodule("proj")))
            for path, m in root.named_modules()
            if isinstance(m, geglu)
        ]
    if not found:
        raise ValueError(
            f'{type(root).__name__} has no projection for targets="{targets}"; '
            "give name patterns instead, or a model with attention layers"
        )
    return found


def has_fused_qkv(attention: nn.Module | None) -> bool:
    """Whether ``attention`` calls one fused projection in place of ``to_q``, ``to_k``, ``to_v``.

    ``unfuse_qkv_projections`` puts the processors of an ``Attention`` back but leaves its flag set, so there the
    processor has the last word.
    """
    fused = bool(getattr(attention, "fused_projections", False))
    if isinstance(attention, _diffusers_class("attention_processor", "Attention")):
        return fused and has_fused_processor(attention)
    return fused


def _diffusers_class(module: str, name: str) -> type[nn.Module] | tuple[()]:
    """A class of ``diffusers.models``, for ``isinstance``.

    While its module is not imported no model has a layer of that class: then the empty tuple, of which nothing is an
    instance. So a model that is not of diffusers does not cost the import of diffusers.
    """
    found: type[nn.Module] | tuple[()] = getattr(sys.modules.get(f"diffusers.models.{module}"), name, ())
    return found


def _attention_targets(root: nn.Module) -> Iterator[Target]:
    """Every projection of every attention module under ``root``."""
    classes = (
        _diffusers_class("attention_processor", "Attention"),
        _diffusers_class("attention", "AttentionModuleMixin"),
    )
    for path, module in root.named_modules():
        if isinstance(module, classes):
            names: tuple[str, ...] = DIFFUSERS_PROJECTIONS
        elif all(hasattr(module, name) for name in TRANSFORMERS_PROJECTIONS[:3]):
            names = TRANSFORMERS_PROJECTIONS
        else:
            continue
        for name in names:
            projection = getattr(module, name, None)
            if isinstance(projection, nn.ModuleList | nn.Sequential):  # to_out is [Linear, Dropout]
                name, projection = f"{name}.0", projection[0]
            if projection is not None and _is_linear(_base_layer(projection)):
                yield Target(canonical(f"{path}.{name}" if path else name), _base_layer(projection), module)


def _matching(root: nn.Module, patterns: tuple[str, ...]) -> list[Target]:
    """The Linears whose path matches one of ``patterns``; each pattern must match at least one."""
    owners = {target.path: target.attention for target in _attention_targets(root)}
    linears = dict(_linears(root))
    used: set[str] = set()
    found = []
    for path, module in linears.items():
        hits = {pattern for pattern in patterns if fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")}
        used |= hits
        if hits:
            found.append(Target(path, module, owners.get(path)))
    if unused := [pattern for pattern in patterns if pattern not in used]:
        examples = ", ".join(list(linears)[:3])
        raise ValueError(f"no Linear of {type(root).__name__} matches {unused}; its paths look like: {examples}")
    return found


def _linears(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All Linears with canonical paths; inside a LoRA layer only the base layer counts, under the layer's own path.

    Linears of attention processors (IP-Adapter, Custom Diffusion) are left out: they come and go with the processor.
    So are fused projections, which ``unfuse_qkv_projections`` leaves behind.
    """
    attention = _diffusers_class("attention_processor", "Attention")
    wrappers = [path for path, module in root.named_modules() if hasattr(module, "base_layer")]
    wrappers += [f"{path}.processor" for path, module in root.named_modules() if isinstance(module, attention)]
    for path, module in root.named_modules():
        inside = any(path.startswith(f"{wrapper}.") for wrapper in wrappers)
        parent, _, name = path.rpartition(".")
        if name in FUSED_PROJECTIONS and hasattr(root.get_submodule(parent), "to_q"):
            continue
        if path and not inside and _is_linear(_base_layer(module)):
            yield canonical(path), _base_layer(module)


def _base_layer(module: nn.Module) -> nn.Module:
    """The Linear inside a PEFT layer, or the module itself."""
    while hasattr(module, "base_layer"):
        module = unwrapped(module.get_submodule("base_layer"))
    return module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )
