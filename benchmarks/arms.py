"""The arms that the benchmarks compare: ours, by attaching and as a tuner of PEFT, PEFT's own, and ETHER as the paper
writes it, with dense blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion.core.targets import find_targets
from ether_diffusion.peft_tuner import EtherPeftConfig

Arm = Callable[[nn.Module], list[nn.Parameter]]
"""Puts a method on a frozen model and returns what it trains."""


class DenseEther(nn.Module):
    """H W H as the paper writes it: dense blocks multiplied into the weight, with autograd through the product."""

    def __init__(self, linear: nn.Linear, n_blocks: int, plus: bool) -> None:
        super().__init__()
        self.linear = linear
        widths = [linear.in_features, linear.out_features] if plus else [linear.in_features]
        device = linear.weight.device
        self.sides = nn.ParameterList(
            nn.Parameter(torch.randn(1 + plus, n_blocks, width // n_blocks, device=device)) for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        blocks = [self.blocks(vectors).to(weight.dtype) for vectors in self.sides]
        chunks = weight.unflatten(1, (len(blocks[0]), -1))
        weight = torch.einsum("fnd,nde->fne", chunks, blocks[0]).flatten(1)
        if len(blocks) == 2:
            chunks = weight.unflatten(0, (len(blocks[1]), -1))
            weight = torch.einsum("ngf,nfd->ngd", blocks[1], chunks).flatten(0, 1)
        return nn.functional.linear(x, weight, self.linear.bias)

    def blocks(self, vectors: Tensor) -> Tensor:
        """I - 2 û ûᵀ, or I - û ûᵀ + v̂ v̂ᵀ, (n, d / n, d / n)."""
        outer = [v.unsqueeze(2) * v.unsqueeze(1) for v in vectors / vectors.norm(dim=-1, keepdim=True)]
        eye = torch.eye(outer[0].shape[-1], device=vectors.device)
        return eye - 2 * outer[0] if len(outer) == 1 else eye - outer[0] + outer[1]


def frozen(model: nn.Module) -> list[nn.Parameter]:
    return []


def ours(method: str, n_blocks: int) -> Arm:
    return lambda model: list(ether.attach(model, ether.EtherConfig(method, n_blocks)).parameters())


def dense(n_blocks: int, plus: bool) -> Arm:
    def prepare(model: nn.Module) -> list[nn.Parameter]:
        parameters: list[nn.Parameter] = []
        for target in find_targets(model):
            assert isinstance(target.module, nn.Linear)
            layer = DenseEther(target.module, n_blocks, plus)
            model.set_submodule(target.path, layer)
            parameters += layer.sides.parameters()
        return parameters

    return prepare


def from_peft(config: Callable[[list[str]], peft.PeftConfig]) -> Arm:
    def prepare(model: nn.Module) -> list[nn.Parameter]:
        peft.inject_adapter_in_model(config([target.path for target in find_targets(model)]), model)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    return prepare


def tuner(variant: str, n_blocks: int) -> Arm:
    return from_peft(lambda names: EtherPeftConfig(variant=variant, n_blocks=n_blocks, target_modules=names))


ARMS: dict[str, Arm] = {
    "frozen": frozen,
    **{f"ETHER n={n}": ours("ether", n) for n in (1, 4, 16)},
    **{f"ETHER+ n={n}": ours("ether_plus", n) for n in (1, 4, 16)},
    "ETHER n=4, peft": tuner("ether", 4),
    "ETHER+ n=4, peft": tuner("ether_plus", 4),
    "LoRA r=4": from_peft(lambda names: peft.LoraConfig(r=4, lora_alpha=4, target_modules=names)),
    "OFT n=4": from_peft(lambda names: peft.OFTConfig(r=4, oft_block_size=0, target_modules=names)),
    "BOFT n=4": from_peft(lambda names: peft.BOFTConfig(boft_block_num=4, boft_block_size=0, target_modules=names)),
    "HRA r=8": from_peft(lambda names: peft.HRAConfig(r=8, target_modules=names)),
    **{f"dense ETHER n={n}": dense(n, plus=False) for n in (1, 4)},
    **{f"dense ETHER+ n={n}": dense(n, plus=True) for n in (1, 4)},
}
