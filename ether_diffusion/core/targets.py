"""Where the projections of a UNet, ControlNet, transformer or text encoder are, and which of them presets name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from ether_diffusion.config import suggestion
from ether_diffusion.core.layout import Layout
from ether_diffusion.private import WRAPPERS, has_fused_processor

ATTENTION, SELF, CROSS = "attention", "self-attention", "cross-attention"
MLP, GEGLU, ANY = "feed-forward", "GEGLU", "Linear"
PRESETS = {
    "attention": (ATTENTION,),
    "attention+mlp": (ATTENTION, MLP),
    "all": (ATTENTION, MLP, ANY),
    "self": (SELF,),
    "cross": (CROSS,),
    "attention+geglu": (ATTENTION, GEGLU),
    "attention+geglu_input": (ATTENTION, GEGLU),
    "self_attention": (SELF,),
    "cross_attention": (CROSS,),
}
"""The kinds of Linears that each preset names, all of which must be there; "all" takes what there is. The last two are
older names."""
ONE_SIDED_GEGLU = "attention+geglu_input"
"""The preset that leaves the output side of GEGLU's Linear as it is."""

DIFFUSERS_PROJECTIONS = (
    "to_qkv_mlp_proj",
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
TRANSFORMERS_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj")
T5_PROJECTIONS = ("q", "k", "v", "o")
FEED_FORWARDS = (
    ("proj_mlp",),  # single blocks of FLUX.1
    ("linear_in", "linear_out"),  # FLUX.2
    ("w1", "w2", "w3"),  # Z-Image
    ("linear_1", "linear_2", "linear_3"),  # Lumina
    ("linear_1", "linear_2", "out_projection"),  # AuraFlow
    ("fc1", "fc2"),  # CLIP
    ("wi", "wo"),  # T5
    ("wi_0", "wi_1", "wo"),
    ("gate_proj", "up_proj", "down_proj"),  # Llama, Qwen, Gemma
)
"""Linears that together make a feed-forward, where it is no ``FeedForward`` of diffusers."""
PROMPT_STREAM = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
PROMPT_BLOCKS = ("context_refiner", "token_refiner")
"""Projections of joint attention, and blocks, that see the prompt alone."""
BESIDE_PROMPTS = ("lm_head", "visual", "vision_tower", "multi_modal_projector")
"""Parts of text encoders that no prompt passes on its way to the denoiser."""


@dataclass(frozen=True)
class Target:
    """One frozen projection that an adapter acts on.

    Attributes:
        path: canonical module path, the key in the adapter file; the same whatever version of transformers or
            wrapper (LoRA, torch.compile) stands around the module.
        module: the Linear itself (or a quantised stand-in with ``in_features`` and ``out_features``).
        inputs: its input side: whole, or the parts of a fused Linear that the adapter acts on.
        outputs: likewise its output side; no parts where the adapter leaves it as it is.
        attention: the attention module that calls it, None for projections outside attention.
    """

    path: str
    module: nn.Module
    inputs: Layout
    outputs: Layout
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


def _below(path: str, name: str) -> str:
    """The canonical path of a name under a module's path, which is empty for the root."""
    return canonical(f"{path}.{name}" if path else name)


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
    """The projections of ``model`` that ``targets`` names.

    Presets:

    - "attention": q, k, v and out of every attention, of both streams where there are two. Of a fused Linear the
      attention's parts.
    - "attention+mlp": also the Linears of every feed-forward, and all parts of fused Linears.
    - "all": every Linear of the model, embeddings and modulations among them.
    - "self" and "cross", which together are "attention": "cross" is where the prompt comes in, that is cross
      attention, the prompt's own projections in joint attention, and blocks that see the prompt alone; "self" is
      the rest.
    - "attention+geglu": "attention" and the first Linear of every GEGLU, the paper's setting for controls.
    - "attention+geglu_input": the same, but of the GEGLU's Linear the input side alone, so that ETHER+ is one-sided
      there. So counted, ETHER+ has the paper's number of parameters for controls.
    - "self_attention", "cross_attention": older names of "self" and "cross".

    Args:
        model: a UNet, ControlNet, transformer or text encoder.
        targets: a preset, or patterns. A pattern is a glob over the path of any Linear of the model; it may leave out
            the path's beginning: "to_q", "attn2.to_?", "mid_block.*". A fused Linear is meant with all parts.

    Returns:
        Each projection once, in the order of the kinds that the preset names and of the model's modules.

    Raises:
        ValueError: the preset is unknown, the model has nothing of a kind that it names, or a pattern matches nothing.
    """
    root = root_of(model)
    if not isinstance(targets, str):
        return _matching(root, targets)
    if targets not in PRESETS:
        hint = suggestion(targets, PRESETS) or f'; for a name pattern pass a list: ["{targets}"]'
        raise ValueError(f"unknown targets {targets!r}{hint}; the presets are {', '.join(PRESETS)}")
    named = list(_named(root))
    present = {kind for each in named for kind in each.kinds}

    def missing(preset: str) -> list[str]:
        return [kind for kind in PRESETS[preset] if kind not in present and ANY not in PRESETS[preset]]

    kinds = PRESETS[targets]
    if not named or missing(targets):
        found = [preset for preset in PRESETS if named and not missing(preset)]
        instead = f"the presets that find something in it are {', '.join(found)}" if found else "it has no Linear"
        raise ValueError(
            f'{type(root).__name__} has no {(missing(targets) or kinds)[0]} for targets="{targets}": {instead}; '
            "or give name patterns"
        )
    chosen: dict[str, Target] = {}
    for kind in kinds:
        chosen |= {
            each.target.path: each.target for each in named if kind in each.kinds and each.target.path not in chosen
        }
    gated = {each.target.path for each in named if targets == ONE_SIDED_GEGLU and GEGLU in each.kinds}
    return [
        _input_alone(target) if target.path in gated else target if MLP in kinds else _without_mlp(target)
        for target in chosen.values()
    ]


def find_targets_of_0_1(model: nn.Module, targets: str | tuple[str, ...] = "attention") -> list[Target]:
    """What version 0.1 found, which knew neither parts nor ``proj_out`` and ``o_proj``; empty if it was nothing.

    Its files, and the identities of bases in them, go on having this meaning.
    """
    root, found = root_of(model), []
    if not isinstance(targets, str):
        found = _matching(root, targets)
    elif targets in ("attention", "attention+geglu", "self_attention", "cross_attention"):
        later = ("to_qkv_mlp_proj", "proj_out", "o_proj")
        found = [each for each in _attention_targets(root) if each.path.rpartition(".")[2] not in later]
        if "_" in targets:
            wanted = targets == "cross_attention"
            found = [each for each in found if bool(getattr(each.attention, "is_cross_attention", False)) == wanted]
        if targets == "attention+geglu":
            found += [each.target for each in _named(root) if GEGLU in each.kinds]
    return [
        replace(each, inputs=Layout.whole(each.in_features), outputs=Layout.whole(each.out_features)) for each in found
    ]


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


class _Named(NamedTuple):
    """A Linear, with all of its parts, and the kinds that it counts to."""

    target: Target
    kinds: frozenset[str]


def _named(root: nn.Module) -> Iterator[_Named]:
    """All Linears that presets may name: first those of attention."""
    linears = dict(_linears(root))
    attention = {target.path: target for target in _attention_targets(root)}
    feed_forward, geglu = _feed_forward(root, linears)
    fused = fused_layouts(root)
    for path in dict.fromkeys([*attention, *linears]):
        if any(name in BESIDE_PROMPTS for name in path.split(".")):
            continue
        kinds = {ANY}
        if path in attention:
            kinds |= {ATTENTION, CROSS if _is_of_prompt(attention[path]) else SELF}
        if path in feed_forward or path in fused:
            kinds |= {MLP}
        if path in geglu:
            kinds |= {GEGLU}
        yield _Named(attention.get(path) or _target(path, linears[path], fused), frozenset(kinds))


def _attention_targets(root: nn.Module) -> Iterator[Target]:
    """Every projection of every attention module under ``root``; of a single block also the fused one behind it."""
    classes = (
        _diffusers_class("attention_processor", "Attention"),
        _diffusers_class("attention", "AttentionModuleMixin"),
    )
    fused = fused_layouts(root)
    for path, module in root.named_modules():
        if isinstance(module, classes):
            names: tuple[str, ...] = DIFFUSERS_PROJECTIONS
        elif all(hasattr(module, name) for name in TRANSFORMERS_PROJECTIONS[:3]):
            names = TRANSFORMERS_PROJECTIONS
        elif all(name in module._modules for name in T5_PROJECTIONS):
            names = T5_PROJECTIONS
        elif _below(path, "proj_out") in fused:
            names = ("proj_out",)
        else:
            continue
        for name in names:
            projection = getattr(module, name, None)
            if isinstance(projection, nn.ModuleList | nn.Sequential):  # to_out is [Linear, Dropout]
                name, projection = f"{name}.0", projection[0]
            if projection is not None and _is_linear(_base_layer(projection)):
                found = _target(_below(path, name), _base_layer(projection), fused)
                yield found if name == "proj_out" else replace(found, attention=module)


def fused_layouts(root: nn.Module) -> dict[str, tuple[Layout, Layout]]:
    """Input and output side of every fused Linear of single blocks, whose attention and MLP stand side by side.

    FLUX.2: ``to_qkv_mlp_proj`` makes q, k, v and what goes into the MLP; ``to_out`` takes what comes out of both. In
    FLUX.1, and models made after it, the block's ``proj_out`` does.
    """
    found: dict[str, tuple[Layout, Layout]] = {}
    for path, module in root.named_modules():
        names = module._modules.keys()
        if "to_qkv_mlp_proj" in names:
            inner = int(module.inner_dim)
            width, total = _features(module, "to_qkv_mlp_proj")
            outputs = Layout.side_by_side({"q": inner, "k": inner, "v": inner, "mlp": total - 3 * inner})
            found[_below(path, "to_qkv_mlp_proj")] = (Layout.whole(width), outputs)
            last = "to_out"
        elif {"proj_mlp", "proj_out", "attn"} <= names:
            last, (_, inner) = "proj_out", _features(module, "attn.to_v")
        else:
            continue
        total, width = _features(module, last)
        inputs = Layout.side_by_side({"attention": inner, "mlp": total - inner})
        found[_below(path, last)] = (inputs, Layout.whole(width))
    return found


def _features(module: nn.Module, path: str = "") -> tuple[int, int]:
    """Widths of the input and output of a Linear, or of that at a path in the module."""
    linear = module_at(module, path) if path else module
    return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type, union-attr]


def _feed_forward(root: nn.Module, linears: Mapping[str, nn.Module]) -> tuple[set[str], set[str]]:
    """Paths of the Linears of every feed-forward, and of those that are a GEGLU's."""
    feed_forward, geglu = _diffusers_class("attention", "FeedForward"), _diffusers_class("activations", "GEGLU")
    found, gated = set(), set()
    for path, module in root.named_modules():
        if isinstance(module, feed_forward):
            inside = _below(path, "")
            found |= {each for each in linears if each.startswith(inside)}
        if isinstance(module, geglu):
            gated.add(_below(path, "proj"))
        for names in FEED_FORWARDS:
            paths = {_below(path, name) for name in names}
            if paths <= linears.keys():
                found |= paths
    return found | gated, gated


def _is_of_prompt(target: Target) -> bool:
    """Whether the prompt comes in through a projection of attention."""
    *parents, name = target.path.split(".")
    cross = bool(getattr(target.attention, "is_cross_attention", False))
    return cross or name in PROMPT_STREAM or any(parent in PROMPT_BLOCKS for parent in parents)


def _target(path: str, module: nn.Module, fused: Mapping[str, tuple[Layout, Layout]]) -> Target:
    """A Linear with all of its parts."""
    width_in, width_out = _features(module)
    return Target(path, module, *fused.get(path, (Layout.whole(width_in), Layout.whole(width_out))))


def _input_alone(target: Target) -> Target:
    """A target whose output side stays as it is."""
    return replace(target, outputs=Layout(target.out_features, ()))


def _without_mlp(target: Target) -> Target:
    return replace(target, inputs=target.inputs.without({"mlp"}), outputs=target.outputs.without({"mlp"}))


def _matching(root: nn.Module, patterns: tuple[str, ...]) -> list[Target]:
    """The Linears whose path matches one of ``patterns``; each pattern must match at least one."""
    owners = {target.path: target for target in _attention_targets(root)}
    linears, fused = dict(_linears(root)), fused_layouts(root)
    used: set[str] = set()
    found = []
    for path, module in linears.items():
        hits = {pattern for pattern in patterns if fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")}
        used |= hits
        if hits:
            found.append(owners.get(path) or _target(path, module, fused))
    if unused := [pattern for pattern in patterns if pattern not in used]:
        examples = ", ".join(list(linears)[:3])
        raise ValueError(f"no Linear of {type(root).__name__} matches {unused}; its paths look like: {examples}")
    return found


def _linears(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All Linears with canonical paths; inside a LoRA layer only the base layer counts, under the layer's own path.

    Linears of attention processors (IP-Adapter, Custom Diffusion) are left out: they come and go with the processor.
    So are fused projections, which ``unfuse_qkv_projections`` leaves behind, and those of torch's own attention, which
    reads their weights past all hooks.
    """
    attention = _diffusers_class("attention_processor", "Attention")
    modules = list(root.named_modules())
    opaque = nn.MultiheadAttention
    wrappers = [path for path, module in modules if hasattr(module, "base_layer") or isinstance(module, opaque)]
    wrappers += [f"{path}.processor" for path, module in modules if isinstance(module, attention)]
    for path, module in modules:
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
