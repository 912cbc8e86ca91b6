"""The recipe with the paper's number of parameters for semantic maps (arXiv 2405.20271, Table 3), on meta."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding

from ether_diffusion.pipelines.control_encoder import ControlEncoder
from ether_diffusion.playground.sd15 import UNET
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.sections import AdapterSection
from ether_diffusion.training.trainables import make_trainables

CONFIGS = Path(__file__).parents[2] / "configs"


def millions(count: int) -> str:
    """As the paper's tables have it."""
    return f"{count / 1e6:.1f}M"


@pytest.mark.parametrize(
    ("recipe", "method", "trained", "paper"),
    [
        ("controlnet_sd15_paper", "ether_plus", 423_552, "0.4M"),
        ("controlnet_sd15_paper", "ether", 111_936, "0.1M"),
        ("controlnet_sd15", "ether_plus", 623_232, None),  # GEGLU two-sided: not the paper's count
    ],
)
def test_the_recipe_trains_the_papers_number_of_parameters(
    recipe: str, method: str, trained: int, paper: str | None
) -> None:
    flags = ["--output_dir", "runs/maps", "--train_data_dir", "pairs", "--method", method]
    config = parse_config(ControlConfig, ["--config", str(CONFIGS / f"{recipe}.yaml"), *flags])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    (adapter,) = make_trainables({"unet": unet}, config.section(AdapterSection))
    assert adapter.num_parameters() == trained
    assert (millions(trained) == paper) is (paper is not None)


def test_the_papers_encoder_is_this_one_and_an_idle_time_embedding() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        idle = TimestepEmbedding(320, 4 * 320)  # OFT's class makes it, and its layers, all convolutions, take no time
    encoder = ControlEncoder.of(unet, vae_factor=8)
    acts, waits = (sum(p.numel() for p in module.parameters()) for module in (encoder, idle))
    assert (acts, waits) == (1_086_480, 2_050_560)
    assert millions(acts + waits) == "3.1M"


def test_the_two_recipes_differ_in_the_sides_of_geglu_alone() -> None:
    ours, papers = (
        yaml.safe_load((CONFIGS / f"controlnet_sd15{name}.yaml").read_text(encoding="utf-8")) for name in ("", "_paper")
    )
    assert {key for key in ours.keys() | papers.keys() if ours.get(key) != papers.get(key)} == {"targets"}
    assert papers["targets"] == "attention+geglu_input"
