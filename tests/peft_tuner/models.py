"""A small model, its tuner, and the dense weights that adapters amount to."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import peft
import torch
from helpers import dense_weight
from torch import Tensor, nn

from ether_diffusion.peft_tuner import EtherLinear, EtherPeftConfig

WIDE, NARROW = 24, 16
KINDS: dict[str, dict[str, object]] = {
    "ether": {"variant": "ether", "n_blocks": 2},
    "ether_plus": {"variant": "ether_plus", "n_blocks": 4},
    "one_sided": {"variant": "ether_plus", "n_blocks": 1, "two_sided": False},
    "anchored": {"variant": "anchored", "n_blocks": 4},
}


class Small(nn.Module):
    """Two Linears with biases that matter, a third that no adapter acts on, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NARROW, WIDE)
        self.second = nn.Linear(WIDE, NARROW)
        self.classifier = nn.Linear(NARROW, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.classifier(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return hidden


def small(dtype: torch.dtype = torch.float32) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small().eval()
        with torch.no_grad():
            for module in (model.first, model.second):
                module.bias.copy_(torch.linspace(-1, 1, len(module.bias)))
    return model.to(dtype)


def config(kind: str, **more: object) -> EtherPeftConfig:
    """With vectors that are no identity."""
    targets = {"target_modules": ["first", "second"], "init_weights": False}
    return EtherPeftConfig(**{**targets, **KINDS[kind], **more})  # type: ignore[arg-type]


def tuned(kind: str, dtype: torch.dtype = torch.float32, **more: object) -> peft.PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(small(dtype), config(kind, **more)).eval()


def add(model: peft.PeftModel, kind: str, name: str, seed: int = 2, **more: object) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(name, config(kind, **more))


def layers(model: nn.Module) -> dict[str, EtherLinear]:
    return {path.split(".")[-1]: each for path, each in model.named_modules() if isinstance(each, EtherLinear)}


def dense(layer: EtherLinear, strengths: Mapping[str, float], weight: Tensor | None = None) -> Tensor:
    """W + Σ s ΔW in fp64, by the paper's formulas; differentiable in the vectors."""
    weight = (layer.get_base_layer().weight if weight is None else weight).detach().double()
    total = weight
    for name, strength in strengths.items():
        if name in layer.ether_methods:
            vectors = layer.ether_methods[name].state_dict(keep_vars=True)
            total = total + strength * (dense_weight(weight, vectors) - weight)
    return total


def output(model: nn.Module, x: Tensor, strengths: Mapping[str, float]) -> Tensor:
    """Of the small model in fp64, with dense weights; differentiable in the vectors."""
    inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
    hidden = x.double()
    for layer in (inner.first, inner.second):
        hidden = torch.tanh(hidden @ dense(layer, strengths).T + layer.bias.detach().double())
    last = inner.classifier
    return hidden @ last.weight.detach().double().T + last.bias.detach().double()


def batch(rows: int = 5, dtype: torch.dtype = torch.float32, width: int = NARROW) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(9)).to(dtype)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's, copied."""
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers(model).items()}


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
