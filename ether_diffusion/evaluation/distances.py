"""How far training moved a model: ‖T - I‖_F of the transforms, ‖W' - W‖_F of the weights (Sec. 4, Fig. 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion.adapter import host_of
from ether_diffusion.attention import find_targets, root_of
from ether_diffusion.functional import dense_reflection, dense_relaxed_reflection
from ether_diffusion.training.trainables import ADAPTER_NAME


@torch.no_grad()
def effective_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What each attention projection of ``model`` amounts to with whatever is active in it: path and (f, d) fp32.

    The columns are its answers to unit vectors, its bias taken off; so it holds for any kind of adapter.
    """
    root = root_of(_inside(model))
    for target in find_targets(root):
        projection = root.get_submodule(target.path)  # peft's layer, where there is one
        parameter = next(target.module.parameters())
        basis = torch.eye(target.in_features, dtype=parameter.dtype, device=parameter.device)
        yield target.path, (projection(basis) - projection(torch.zeros_like(basis[:1]))).mT.float()


@torch.no_grad()
def transforms(model: nn.Module, method: str) -> Iterator[tuple[str, Tensor]]:
    """The matrices that ``method`` multiplies the weights with, (d, d) or on the output side (f, f), fp32, by path.

    None for lora and full, which add; the adapter of ether, ether_plus and naive is the model's only one.
    """
    model = _inside(model)
    host = host_of(model)
    if host is not None:
        for adapter in host.adapters.values():
            for path, transform in adapter.methods().items():
                vectors = dict(transform.named_parameters())
                if method == "naive":
                    yield path, torch.block_diag(*vectors["blocks"])
                elif method == "ether":
                    yield path, dense_reflection(vectors["u"])
                else:
                    yield path, dense_relaxed_reflection(vectors["u"], vectors["v"])
                    if "u_out" in vectors:
                        yield f"{path}, output", dense_relaxed_reflection(vectors["u_out"], vectors["v_out"])
    elif method in _PEFT:
        for path, layer in model.named_modules():
            if hasattr(layer, "base_layer"):
                yield path, _PEFT[method](layer).float()


def mean_distances(model: nn.Module, base: nn.Module, method: str) -> dict[str, float | None]:
    """The means of ‖W' - W‖_F over the attention projections and of ‖T - I‖_F over the transforms, None without any.

    Args:
        model: the finetuned UNet, its adapter active.
        base: the UNet as it was.
        method: of train_dreambooth.py.
    """
    before = dict(effective_weights(base))
    weights = [(after - before[path].to(after.device)).norm().item() for path, after in effective_weights(model)]
    moved = [(t - torch.eye(len(t), device=t.device)).norm().item() for _, t in transforms(model, method)]
    return {"weights": fmean(weights), "transforms": fmean(moved) if moved else None}


_PEFT: Mapping[str, Callable[[Any], Tensor]] = {
    "oft": lambda layer: layer.oft_R[_name(layer.oft_R)].get_weight(),
    "boft": lambda layer: layer.get_delta_weight(_name(layer.boft_R))[0],
    "hra": lambda layer: layer.get_delta_weight(_name(layer.hra_u)),
}


def _inside(model: nn.Module) -> nn.Module:
    """The model in which peft put its layers, without the wrapper that ``PeftModel.from_pretrained`` gives it."""
    inside: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inside


def _name(parameters: Mapping[str, Any]) -> str:
    """The adapter's name in a peft layer: what was trained, or what ``from_pretrained`` calls it."""
    return ADAPTER_NAME if ADAPTER_NAME in parameters else "default"
