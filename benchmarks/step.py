"""Time of a training step of each method against the frozen model, as ratios measured in one process.

The true SD1.5 UNet with random weights. A step is the forward and backward that training needs; "frozen" is the
forward and the backward to the input, which no method can do without. The methods take turns round by round, so
that a noisy machine disturbs all alike; each figure is the median over the rounds, divided by frozen's.

    python benchmarks/step.py --resolution 256 --rounds 5
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion.attention import find_targets
from ether_diffusion.playground.sd15 import UNET


class DenseEther(nn.Module):
    """ETHER as the paper writes it: dense blocks multiplied into the weight, with autograd through the product."""

    def __init__(self, linear: nn.Linear, n_blocks: int) -> None:
        super().__init__()
        self.linear = linear
        self.u = nn.Parameter(torch.randn(n_blocks, linear.in_features // n_blocks))

    def forward(self, x: Tensor) -> Tensor:
        u = self.u / self.u.norm(dim=-1, keepdim=True)
        width = u.shape[1]
        blocks = torch.eye(width) - 2 * u.unsqueeze(2) * u.unsqueeze(1)
        weight = self.linear.weight.unflatten(1, (len(u), width))
        transformed = torch.einsum("fnd,nde->fne", weight, blocks).flatten(1)
        return nn.functional.linear(x, transformed, self.linear.bias)


def frozen(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    return []


def ours(**settings: object) -> Callable[[UNet2DConditionModel], list[nn.Parameter]]:
    return lambda unet: list(ether.attach(unet, ether.EtherConfig(**settings)).parameters())  # type: ignore[arg-type]


def from_peft(config: Callable[[list[str]], peft.PeftConfig]) -> Callable[[UNet2DConditionModel], list[nn.Parameter]]:
    def prepare(unet: UNet2DConditionModel) -> list[nn.Parameter]:
        peft.inject_adapter_in_model(config([target.path for target in find_targets(unet)]), unet)
        return [parameter for parameter in unet.parameters() if parameter.requires_grad]

    return prepare


def dense(n_blocks: int) -> Callable[[UNet2DConditionModel], list[nn.Parameter]]:
    def prepare(unet: UNet2DConditionModel) -> list[nn.Parameter]:
        parameters = []
        for target in find_targets(unet):
            assert isinstance(target.module, nn.Linear)
            layer = DenseEther(target.module, n_blocks)
            unet.set_submodule(target.path, layer)
            parameters.append(layer.u)
        return parameters

    return prepare


METHODS: dict[str, Callable[[UNet2DConditionModel], list[nn.Parameter]]] = {
    "frozen": frozen,
    "ETHER n=1": ours(method="ether", n_blocks=1),
    "ETHER n=4": ours(method="ether", n_blocks=4),
    "ETHER+ n=1": ours(n_blocks=1),
    "ETHER+ n=4": ours(n_blocks=4),
    "ETHER+ n=16": ours(n_blocks=16),
    "dense ETHER n=4": dense(4),
    "LoRA r=4": from_peft(lambda names: peft.LoraConfig(r=4, lora_alpha=4, target_modules=names)),
    "OFT n=4": from_peft(lambda names: peft.OFTConfig(r=4, oft_block_size=0, target_modules=names)),
    "HRA r=8": from_peft(lambda names: peft.HRAConfig(r=8, target_modules=names)),
}


def step(unet: UNet2DConditionModel, parameters: list[nn.Parameter], batch: dict[str, Tensor]) -> float:
    """Seconds of one forward and backward."""
    began = time.perf_counter()
    sample = batch["sample"].clone().requires_grad_(not parameters)
    prediction = unet(sample, batch["timesteps"], batch["prompt_embeds"]).sample
    torch.nn.functional.mse_loss(prediction, batch["noise"]).backward()
    seconds = time.perf_counter() - began
    for parameter in parameters:
        parameter.grad = None
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    side = arguments.resolution // 8
    batch = {
        "sample": torch.randn(1, 4, side, side),
        "noise": torch.randn(1, 4, side, side),
        "timesteps": torch.tensor([500]),
        "prompt_embeds": torch.randn(1, 77, 768),
    }
    base = UNet2DConditionModel(**UNET).requires_grad_(False)
    models = {}
    for name in dict.fromkeys(["frozen", *arguments.methods]):
        # the frozen weights are shared by all the models; only what a method adds is its own
        unet = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        models[name] = (unet, METHODS[name](unet))
        step(*models[name], batch)  # warm-up
        gc.collect()
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(arguments.rounds):
        for name, (unet, parameters) in models.items():
            times[name].append(step(unet, parameters, batch))
        print(f"round {number + 1} of {arguments.rounds}", flush=True)
    reference = statistics.median(times["frozen"])
    rows = {
        name: {
            "parameters": sum(parameter.numel() for parameter in models[name][1]),
            "ratio": round(statistics.median(seconds) / reference, 3),
            "quartiles": [round(q / reference, 3) for q in statistics.quantiles(seconds, n=4)[::2]],
        }
        for name, seconds in times.items()
    }
    print(
        f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"SD1.5 UNet, {arguments.resolution} px, batch 1, fp32, {arguments.rounds} rounds; frozen: {reference:.2f} s")
    print(f"{'method':18}{'parameters':>12}{'step / frozen':>15}   quartiles")
    for name, row in rows.items():
        print(f"{name:18}{row['parameters']:>12,}{row['ratio']:>15}   {row['quartiles']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
