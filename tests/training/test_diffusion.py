"""The objective against its closed forms, with ᾱ computed here from the betas, in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ether_diffusion.families.diffusion import Diffusion
from ether_diffusion.families.registry import family_of
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.training.batches import Batch
from ether_diffusion.training.model import DenoisingModel

SETTINGS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = torch.tensor([0, 20, 400, 999])


def alpha_bar(zero_terminal_snr: bool = False) -> Tensor:
    """ᾱ_t = Π (1 - β_s), s ≤ t; with zero terminal SNR √ᾱ is shifted and scaled (arXiv 2305.08891, algorithm 1)."""
    betas = torch.linspace(SETTINGS["beta_start"] ** 0.5, SETTINGS["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    roots = (1 - betas).cumprod(0).sqrt()
    if zero_terminal_snr:
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return roots**2


def objective(kind: str, gamma: float | None = None, zero_terminal_snr: bool = False) -> Diffusion:
    scheduler = DDPMScheduler(**SETTINGS, prediction_type=kind, rescale_betas_zero_snr=zero_terminal_snr)
    return Diffusion(scheduler, gamma)


def tensors(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(T), 4, 8, 8, generator=generator) for _ in range(count)]


def test_noisy_latents_mix_by_the_schedule() -> None:
    latents, noise = tensors(2)
    a = alpha_bar()[T].view(-1, 1, 1, 1)
    expected = a.sqrt() * latents.double() + (1 - a).sqrt() * noise.double()
    torch.testing.assert_close(
        objective("epsilon").add_noise(latents, noise, T).double(), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_is_the_noise_or_the_velocity(kind: str) -> None:
    latents, noise = tensors(2)
    a = alpha_bar()[T].view(-1, 1, 1, 1)
    velocity = a.sqrt() * noise.double() - (1 - a).sqrt() * latents.double()
    expected = noise.double() if kind == "epsilon" else velocity
    torch.testing.assert_close(objective(kind).target(latents, noise, T).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("gamma", [None, 5.0, 0.5])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_losses_are_weighted_by_min_snr(kind: str, gamma: float | None, zero_terminal_snr: bool) -> None:
    prediction, target = tensors(2)
    a = alpha_bar(zero_terminal_snr)[T]
    snr = a / (1 - a)
    assert (float(snr[-1]) < 1e-15) == zero_terminal_snr
    mse = (prediction.double() - target.double()).square().mean((1, 2, 3))
    if gamma is None:
        weight = torch.ones_like(mse)
    elif kind == "epsilon":
        weight = torch.tensor([1.0 if s <= gamma else gamma / s for s in snr.tolist()], dtype=torch.float64)
    else:
        weight = torch.tensor([min(s, gamma) / (s + 1) for s in snr.tolist()], dtype=torch.float64)
    losses = objective(kind, gamma, zero_terminal_snr).losses(prediction, target, T)
    assert losses.dtype == torch.float32
    # ᾱ is a product of a thousand fp32 factors, and 1 - ᾱ loses digits at the first timestep
    torch.testing.assert_close(losses.double(), mse * weight, rtol=2e-4, atol=1e-12)


def test_losses_of_half_precision_predictions_are_taken_in_fp32() -> None:
    prediction, target = tensors(2)
    losses = objective("epsilon").losses(prediction.bfloat16(), target, T)
    expected = (prediction.bfloat16().double() - target.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


def test_a_base_that_predicts_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the base predicts 'sample'; this program trains epsilon and v_prediction"):
        objective("sample")


@pytest.mark.parametrize("gamma", [None, 0.5])
def test_class_and_instance_images_are_weighted_alike(gamma: float | None) -> None:
    """Swapping which half of a batch is the prior swaps the two losses, SNR weight and all."""
    pipe = tiny_pipeline()
    latents, noise = tensors(2)

    def losses(prior: list[bool], weight: float) -> dict[str, float]:
        model = DenoisingModel(family_of(pipe), [], objective("epsilon", gamma), weight)
        batch = Batch(latents, noise, T, ["a dog"] * 4, torch.zeros(4, 6), torch.tensor(prior))
        with torch.no_grad():
            return {key: float(value) for key, value in model([[batch]])[0].items()}

    one = losses([False, False, True, True], 0.5)
    other = losses([True, True, False, False], 0.5)
    assert one["instance_loss"] == other["prior_loss"]
    assert one["prior_loss"] == other["instance_loss"]
    assert one["loss"] == pytest.approx(one["instance_loss"] + 0.5 * one["prior_loss"], rel=1e-6)
    alone = losses([False, False, False, False], 0.5)
    assert alone.keys() == {"loss"}
    assert alone["loss"] == pytest.approx((one["instance_loss"] + one["prior_loss"]) / 2, rel=1e-6)
    assert math.isfinite(alone["loss"])
