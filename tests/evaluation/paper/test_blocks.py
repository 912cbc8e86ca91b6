"""What blocks cost: bytes against a count by hand, and the study's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ether_diffusion import EtherConfig
from ether_diffusion.cli.programs.studies import block_count as main
from ether_diffusion.evaluation.paper.blocks import Cost, StepInput, analyse, random_input, step, step_bytes, step_costs
from ether_diffusion.families.registry import family_of
from ether_diffusion.registry import OWN_METHODS


class Two(nn.Module):
    """y = tanh(W x): the backward to the input keeps tanh's result and the weight, which is the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5, bias=False).requires_grad_(False)

    def forward(self, sample: Tensor) -> Tensor:
        return torch.tanh(self.linear(sample))


def test_kept_bytes_are_those_of_the_activations() -> None:
    kept = step_bytes(Two(), [], StepInput(torch.randn(4, 6), lambda model, noisy: model(noisy)))
    tanh, difference = 4 * 5 * 4, 4 * 5 * 4  # the loss keeps its input, which is tanh's result, and the target
    assert kept == tanh + difference


def test_the_costs_of_adapters_are_ratios_to_the_frozen_model(pipe: DiffusionPipeline) -> None:
    costs = step_costs(pipe, {"1": EtherConfig(n_blocks=1), "4": EtherConfig(n_blocks=4)}, rounds=2)
    # below 1 it may be: the frozen model's step goes back to the input, an adapter's only to its first projection
    assert all(0.5 < cost.kept < 2 and cost.time > 0 for cost in costs.values())
    frozen = step_bytes(pipe.unet, [], random_input(family_of(pipe), 1))
    assert costs["4"].kept_bytes / frozen == pytest.approx(costs["4"].kept)
    assert pipe.unet.__dict__.get("_ether_host") is None


def test_a_step_leaves_no_gradients(pipe: DiffusionPipeline) -> None:
    pipe.unet.requires_grad_(False)
    weight = pipe.unet.conv_in.weight.requires_grad_(True)
    seen: list[Tensor] = []
    weight.register_hook(seen.append)
    assert step(pipe.unet, [weight], random_input(family_of(pipe), 2)) > 0
    assert weight.grad is None
    assert seen[0].norm() > 0


def test_the_table_is_sorted_by_the_number_of_blocks(tmp_path: Path) -> None:
    results = [
        {
            **{"arm": arm, "learning_rate": None, "subject": "dog", "seed": 0, "judges": {}},
            "images": [{"file": "0.png", "prompt": "p", "dino": value, "clip_t": 0.5}],
        }
        for arm, value in (("many", 0.3), ("one", 0.4))
    ]
    costs = {"one": Cost(1.2, 100, 1.5), "many": Cost(1.1, 90, 1.4)}
    text = analyse(tmp_path, results, {"many": 16, "one": 1}, costs)
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:4]] == ["1", "16"]
    assert "One subject, so there is no interval" in text
    assert "One seed of the training" in text
    assert "| 1 | 0.400 | 0.500 | 1.20 | 1.50 |" in text
    assert json.loads((tmp_path / "blocks.json").read_text())["costs"]["many"]["kept_bytes"] == 90
    assert (tmp_path / "blocks.png").is_file()


def test_only_methods_with_blocks_of_this_library_are_studied(tmp_path: Path) -> None:
    arguments = ["--output_dir", str(tmp_path), "--training", '{"pretrained_model_name_or_path": "playground"}']
    with pytest.raises(SystemExit, match=f"blocks are studied for {', '.join(OWN_METHODS)}, not lora"):
        main([*arguments, "--arms", '{"mine": {"method": "lora"}}'])
