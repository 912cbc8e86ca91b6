"""Whether a LoRA file does what the adapter does, read by diffusers' own loader into models without weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from ether_diffusion.pipelines.file import first_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NAME = "verified"
PROBES = 4
"""Random inputs of every layer."""


@dataclass(frozen=True)
class Verified:
    """How far a file is from the adapter.

    Attributes:
        difference: the largest ‖ΔW x of the file - ΔW x of the adapter‖ / ‖ΔW x of the adapter‖ of any layer, for
            random x; of layers without any effect that of the file.
        effect: the largest ‖ΔW x‖ / ‖x‖.
        loaded: layers that diffusers' own loader read; of the others the tensors were compared.
    """

    difference: float
    effect: float
    loaded: int


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
    modules = _loaded(family, {key: tensors[key] for where in ours for key in keys[where]}) if ours else {}
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
            down, up = (tensors[key] for key in keys[where])
            compared.append(compare(layer, down, up))
    return Verified(max(each.difference for each in compared), max(each.effect for each in compared), len(ours))


def _read_by_diffusers(family: Family, layer: LoraLayer, keys: Keys, scheme: Mapping[str, str]) -> bool:
    """Whether the layer's keys are such as diffusers' loader takes: its own, or kohya's of a UNet pipeline.

    Of the latter it takes no layers that tell SDXL its sizes.
    """
    if layer.component not in scheme:
        return False
    if not keys[0].endswith(DOTTED[0]):
        return not layer.path.startswith("add_embedding.")
    own = family.lora_stem(layer.component, layer.path, "diffusers")
    return keys[0] == f"{own}.{DOTTED[0]}"


def _loaded(family: Family, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The LoRA layers that diffusers makes of the tensors of a file, by component and canonical path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    pipe = hollow_pipeline(family)
    try:
        with _quiet():
            pipe.load_lora_weights(tensors, adapter_name=NAME)
    except Exception as error:  # whatever its conversion of keys stumbles over
        raise ExportError(f"diffusers cannot load the file: {first_line(error)}") from error
    return {
        _canonical(f"{component}.{name}", family): module
        for component in family.components
        for name, module in getattr(pipe, component).named_modules()
        if isinstance(module, BaseTunerLayer)
    }


@torch.no_grad()
def compare(layer: LoraLayer, down: Tensor, up: Tensor, scale: float = 1.0) -> Verified:
    """What a file adds in one layer, scale · up down, with what it should be, on random inputs."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(PROBES, layer.down.shape[1], generator=random, dtype=torch.float64)
    expected = x @ layer.down.T @ layer.up.T
    read = x @ down.double().T @ up.double().T * scale
    size, error = float(expected.norm()), float((read - expected).norm())
    return Verified(error / size if size else error, size / float(x.norm()), 1)


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' remarks on components that the file has nothing for."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
