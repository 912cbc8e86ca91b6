"""Whether a LoRA file does what the adapter does, read by diffusers' own loader into models without weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ether_diffusion.core.targets import unwrapped
from ether_diffusion.export.factors import ExportError, LoraLayer
from ether_diffusion.export.names import DOTTED, Keys
from ether_diffusion.families.protocol import Family
from ether_diffusion.logs import errors_only
from ether_diffusion.pipelines.file import first_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NAME = "verified"
NEGLIGIBLE = 1e-3
"""An effect of a layer below this share of the largest is not asked to be exact by itself."""
_LOADING = threading.Lock()
"""diffusers and PEFT change classes of torch for a moment while they load."""


@dataclass(frozen=True)
class Verified:
    """How far a file is from the adapter.

    Attributes:
        difference: the largest ‖ΔW x of the file - ΔW x of the adapter‖ / ‖ΔW x of the adapter‖ of any layer, for
            random x; of layers that hardly do anything beside ``NEGLIGIBLE`` of the largest effect.
        effect: the largest ‖ΔW x‖ / ‖x‖.
        loaded: layers that diffusers' own loader read; of the others the tensors were compared.
    """

    difference: float
    effect: float
    loaded: int


@dataclass(frozen=True)
class Compared:
    """Of one layer ‖ΔW x of the file - ΔW x of the adapters‖, ‖ΔW x of the adapters‖ and ‖x‖."""

    error: float
    size: float
    asked: float


def verify(family: Family, layers: Mapping[str, LoraLayer], keys: Mapping[str, Keys], path: Path) -> Verified:
    """Read a file back, and compare what every layer adds with what it should.

    Layers that diffusers reads go through ``load_lora_weights`` of the family's pipeline: a copy whose models have
    their layers and no weights of their own, so that a base need not fit into memory twice. Of layers that only another
    tool reads the tensors under that tool's keys are compared.

    Args:
        family: of the pipeline with the adapter, which is left alone.
        layers: the exact updates, by component and path.
        keys: of every layer in the file.
        path: the file.

    Raises:
        ExportError: diffusers cannot load the file, or leaves layers out, or adds others.
    """
    tensors, scheme = load_file(path), family.LORA_FORMATS.get("diffusers", {})
    ours = {where for where in layers if _read_by_diffusers(family, layers[where], keys[where], scheme)}
    modules = _loaded(family, {key: tensors[key] for where in ours for key in keys[where][:2]}) if ours else {}
    if modules.keys() != ours:
        missing, more = sorted(ours - modules.keys()), sorted(modules.keys() - ours)
        raise ExportError(
            f"diffusers reads {len(modules)} layers where {len(ours)} were written; without effect: "
            f"{', '.join(missing[:3]) or 'none'}; unknown: {', '.join(more[:3]) or 'none'}"
        )
    compared = []
    for where, layer in layers.items():
        if where in ours:
            module = modules[where]
            down, up = (getattr(module, part)[NAME].weight for part in ("lora_A", "lora_B"))
            compared.append(compare(layer, down, up, module.scaling[NAME]))
        else:
            up = keys[where].rows(tensors[keys[where].up])[: len(layer.up)]
            compared.append(compare(layer, tensors[keys[where].down], up))
    effect = max(each.size / each.asked for each in compared)
    least = NEGLIGIBLE * effect
    differences = [each.error / max(each.size, least * each.asked) if effect else each.error for each in compared]
    return Verified(max(differences), effect, len(ours))


def _read_by_diffusers(family: Family, layer: LoraLayer, keys: Keys, scheme: Mapping[str, str]) -> bool:
    """Whether the layer's keys are such as diffusers' loader takes: its own, or kohya's of a UNet pipeline.

    Of the latter it takes no layers that tell SDXL its sizes.
    """
    if layer.component not in scheme:
        return False
    if not keys.down.endswith(DOTTED[0]):
        return not layer.path.startswith("add_embedding.")
    own = family.lora_stem(layer.component, layer.path, "diffusers")
    return keys.down == f"{own}.{DOTTED[0]}"


def _loaded(family: Family, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The LoRA layers that diffusers makes of the tensors of a file, by component and canonical path."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError(
            "a LoRA file is checked with peft, which diffusers loads it with: pip install 'ether-diffusion[study]'"
        ) from error
    try:
        with _LOADING, errors_only("diffusers"):
            pipe = hollow_pipeline(family)
            pipe.load_lora_weights(tensors, adapter_name=NAME, low_cpu_mem_usage=False)
    except Exception as error:  # whatever its conversion of keys stumbles over
        raise ExportError(f"diffusers cannot load the file: {first_line(error)}") from error
    return {
        _canonical(f"{component}.{name}", family): module
        for component in family.components
        for name, module in getattr(pipe, component).named_modules()
        if isinstance(module, BaseTunerLayer)
    }


@torch.no_grad()
def compare(layer: LoraLayer, down: Tensor, up: Tensor, scale: float = 1.0) -> Compared:
    """What a file adds in one layer, scale · up down, with what the adapters add, on random inputs."""
    read = layer.probes @ down.double().T @ up.double().T * scale
    return Compared(float((read - layer.moved).norm()), float(layer.moved.norm()), float(layer.probes.norm()))


def hollow_pipeline(family: Family) -> DiffusionPipeline:
    """A pipeline of the same class, whose denoiser and text encoders have zeros that take no memory for weights."""
    pipe = copy.copy(family.pipe)
    for name, part in family.pipe.components.items():
        if isinstance(part, nn.Module):
            setattr(pipe, name, hollow(unwrapped(part)) if name in family.components else None)
    return pipe


def hollow(module: nn.Module) -> nn.Module:
    """A model of the same class and settings; each tensor is one zero, shown as often as the shape has places."""
    kind: Any = type(module)
    make = getattr(kind, "from_config", kind)  # of diffusers, of transformers
    with torch.device("meta"):
        made: nn.Module = make(module.config)
    for each in made.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(_zeros(parameter), requires_grad=False)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = _zeros(buffer)
    return made


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32).expand(like.shape)


def _canonical(key: str, family: Family) -> str:
    """``text_encoder.text_model.encoder…`` of some classes is ``text_encoder.encoder…`` of ours."""
    component, _, path = key.partition(".")
    return f"{component}.{path.removeprefix('text_model.')}" if component in family.text_encoders else key
