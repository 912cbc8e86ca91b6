"""How far training moved a model: distances of transforms and weights, and the hyperspherical energy of its layers.

‖T - I‖_F and ‖W' - W‖_F: arXiv 2405.20271, Sec. 4 and Fig. 4; the energy: Sec. 5.3 and Fig. 7, and OFT (2306.07280).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from ether_diffusion.core.host import host_of
from ether_diffusion.core.targets import root_of
from ether_diffusion.families.parts import DENOISERS, TEXT_ENCODERS
from ether_diffusion.registry import METHODS

CHUNK = 64
"""Neurons compared with all others at a time."""
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)
"""Of a pipeline, those that a run may train."""


Components = Mapping[str, nn.Module]
"""Modules by their name in the pipeline."""


def trained_layers(model: nn.Module) -> list[str]:
    """The paths of the layers that carry an adapter, whatever its targets; of a model without any, all layers.

    A layer is an ``nn.Linear`` or a convolution. Attention is not special: feed-forward layers count where they are
    targets, and of full finetuning every matrix counts.
    """
    root = root_of(_inside(model))
    found: dict[str, bool] = {}
    host = host_of(_inside(model))
    targets = set() if host is None else {path for each in host.adapters.values() for path in each.methods()}
    for path, module in root.named_modules():
        if hasattr(module, "base_layer"):
            found[path] = True
        elif isinstance(module, nn.Linear | nn.Conv2d) and not any(part in found for part in _parents(path)):
            found[path] = path in targets
    adapted = [path for path, has_adapter in found.items() if has_adapter]
    return adapted or list(found)


def _parents(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


@torch.no_grad()
def effective_weights(model: nn.Module, paths: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """What layers of ``model`` amount to with whatever is active in it: path and (f, d) fp32.

    The columns are a layer's answers to unit vectors, its bias taken off; so it holds for any kind of adapter. A
    convolution, which no adapter changes, is its weight with one row for each output channel.

    Args:
        model: a component of a pipeline.
        paths: of the layers; those of :func:`trained_layers` where none are given.
    """
    root = root_of(_inside(model))
    for path in trained_layers(model) if paths is None else paths:
        layer = root.get_submodule(path)  # peft's layer, where there is one
        plain: nn.Module = getattr(layer, "base_layer", layer)
        if isinstance(plain, nn.Linear):
            basis = torch.eye(plain.in_features, dtype=plain.weight.dtype, device=plain.weight.device)
            yield path, (layer(basis) - layer(torch.zeros_like(basis[:1]))).mT.float()
        elif isinstance(plain, nn.Conv2d):
            yield path, plain.weight.flatten(1).float()


@torch.no_grad()
def transforms(model: nn.Module, method: str) -> Iterator[tuple[str, Tensor]]:
    """The matrices that ``method`` multiplies the weights with, (d, d) or on the output side (f, f), fp32, by path.

    None for lora and full, which add; the adapter of ether, ether_plus and naive is the model's only one.
    """
    model, of_layer = _inside(model), METHODS[method].transform
    host = host_of(model)
    if host is not None:
        for adapter in host.adapters.values():
            for path, transform in adapter.methods().items():
                target = root_of(model).get_submodule(path)
                eye = torch.eye(target.in_features, device=next(transform.parameters()).device)  # type: ignore[call-overload]
                yield path, eye + transform.input_delta(eye).mT
                if transform.two_sided:
                    eye = torch.eye(target.out_features, device=eye.device)  # type: ignore[call-overload]
                    yield f"{path}, output", eye + transform.output_delta(eye, None).mT
    elif of_layer is not None:
        for path, layer in model.named_modules():
            if hasattr(layer, "base_layer"):
                yield path, of_layer(layer, layer.active_adapters[0]).float()


def mean_distances(
    pipe: Components, base: Components, method: str, layers: Mapping[str, Sequence[str]] | None = None
) -> dict[str, float | None]:
    """The means of ‖W' - W‖_F over all trained layers and of ‖T - I‖_F over the transforms, None without any.

    Args:
        pipe: the finetuned components by name (:func:`components`), the adapters active.
        base: the components as they were.
        method: of train_dreambooth.py.
        layers: paths of the trained layers by component, where ``pipe`` has no adapter any more that says them.
    """
    weights, moved = [], []
    for name, model in pipe.items():
        if not is_trained(name, model, base[name]):
            continue
        paths = trained_layers(model) if layers is None else layers[name]
        before = dict(effective_weights(base[name], paths))
        after = effective_weights(model, paths)
        weights += [(weight - before[path].to(weight.device)).norm().item() for path, weight in after]
        moved += [(t - torch.eye(len(t), device=t.device)).norm().item() for _, t in transforms(model, method)]
    return {"weights": fmean(weights), "transforms": fmean(moved) if moved else None}


def components(pipe: DiffusionPipeline) -> Components:
    """The modules of a pipeline that a run may train."""
    return {name: module for name in COMPONENTS if (module := getattr(pipe, name, None)) is not None}


def is_trained(name: str, model: nn.Module, base: nn.Module) -> bool:
    """Whether a component was trained: always the denoiser; a text encoder with an adapter or with other weights."""
    if name in DENOISERS or host_of(_inside(model)) is not None:
        return True
    if any(hasattr(module, "base_layer") for module in model.modules()):
        return True
    theirs = dict(base.named_parameters())
    return any(not torch.equal(own, theirs[path].to(own.device)) for path, own in model.named_parameters())


def hyperspherical_energy(weight: Tensor, chunk: int = CHUNK) -> float:
    """HE(W) = Σ_{i≠j} ‖ŵᵢ - ŵⱼ‖⁻¹ over the neurons' unit weight vectors, in fp64.

    A neuron is an output feature: a row of ``nn.Linear.weight``. Reflecting or rotating the input features, as ETHER
    and OFT do, leaves all distances between rows, and so HE, as they are.

    Args:
        weight: (f, d), any floating dtype.
        chunk: rows that are compared with all others at a time; the memory is that of (chunk, f) and (f, d) in fp64.

    Raises:
        ValueError: there are fewer than two neurons, or two have the same direction, whose energy is infinite.
    """
    if weight.ndim != 2 or len(weight) < 2:
        raise ValueError(f"a layer of at least two neurons is needed, not a weight of shape {tuple(weight.shape)}")
    unit = F.normalize(weight.double(), dim=1)
    total = 0.0
    for start in range(0, len(unit), chunk):
        rows = unit[start : start + chunk]
        # not by way of the cosines: 1 - cos loses half of the digits where two neurons are close
        distances = torch.cdist(rows, unit, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(rows), device=unit.device)
        distances[own, own + start] = torch.inf
        if (distances == 0).any():
            raise ValueError("two neurons have the same direction: their energy is infinite")
        total += distances.reciprocal().sum().item()
    return total


Energies = dict[str, float]
"""HE of layers by their paths."""


def energies(model: nn.Module, show: str, paths: Sequence[str] | None = None) -> Energies:
    """HE(W) of what each layer amounts to, by path.

    Args:
        model: a component of a pipeline.
        show: name of the progress bar.
        paths: of the layers; the trained ones where none are given. One with a single neuron has no energy.
    """
    layers = trained_layers(model) if paths is None else paths
    weights = tqdm(effective_weights(model, layers), desc=show, unit="layer", total=len(layers))
    return {path: hyperspherical_energy(weight) for path, weight in weights if len(weight) > 1}


def change(before: Energies, after: Energies) -> dict[str, Any]:
    """(HE(W') - HE(W)) / HE(W) by layer, and of the sums over all layers.

    Raises:
        ValueError: the layers are not the same.
    """
    if before.keys() != after.keys():
        raise ValueError("the run and its base do not have the same layers")
    total = sum(before.values())
    return {
        "all": (sum(after.values()) - total) / total,
        "layers": {path: (after[path] - energy) / energy for path, energy in before.items()},
    }


def _inside(model: nn.Module) -> nn.Module:
    """The model in which peft put its layers, without the wrapper that ``PeftModel.from_pretrained`` gives it."""
    inside: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inside
