"""How σ is drawn: the quantiles of 10,000 draws against the closed form of each distribution, and the base's shift."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from families.tiny import build
from scipy import stats

from ether_diffusion.families.flow import FlowMatching, Sigmas, scheduler_misfit, scheduler_shift, shift_by_tokens
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.settings import ObjectiveSettings

SIZE = (8, 8)


def unshifted(scheme: str, **settings: float) -> FlowMatching:
    return FlowMatching(lambda size: 1.0, Sigmas(scheme, **settings))  # type: ignore[arg-type]


def draws(objective: FlowMatching, number: int = 10_000) -> np.ndarray:
    random = torch.Generator().manual_seed(0)
    levels = torch.stack([objective.levels.draw(random) for _ in range(number)])
    return objective.times(levels, SIZE).double().numpy()


def mode_quantile(u: np.ndarray, scale: float) -> np.ndarray:
    """f is decreasing in u for the scales that are allowed, so its quantile at p is f(1 - p)."""
    v = 1 - u
    return 1 - v - scale * (np.cos(np.pi * v / 2) ** 2 - 1 + v)


@pytest.mark.parametrize("mean", [0.0, 0.7])
def test_logit_normal_draws_have_its_quantiles(mean: float) -> None:
    drawn = draws(unshifted("logit_normal", logit_mean=mean, logit_std=0.8))
    found = stats.kstest(np.log(drawn / (1 - drawn)), stats.norm(mean, 0.8).cdf)
    assert found.pvalue > 1e-3


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_the_other_schemes_draw_uniformly(scheme: str) -> None:
    assert stats.kstest(draws(unshifted(scheme)), stats.uniform.cdf).pvalue > 1e-3


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.29])
def test_mode_draws_have_its_quantiles(scale: float) -> None:
    drawn, levels = np.sort(draws(unshifted("mode", mode_scale=scale))), np.linspace(0.01, 0.99, 99)
    expected = mode_quantile(levels, scale)
    counted = np.searchsorted(drawn, expected) / len(drawn)  # uniform in the levels, whatever the slope
    assert np.abs(counted - levels).max() < 1.95 / math.sqrt(len(drawn))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_static_shift_is_the_schedulers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective = FlowMatching(scheduler_shift(scheduler, lambda size: 0.0))
    levels = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(objective.times(levels, SIZE), scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("name", ["flux", "qwen_image", "chroma", "krea2", "krea2 turbo", "lumina2"])
def test_the_shift_by_size_is_the_pipelines(name: str, kind: str) -> None:
    pipe = build(name)
    config = dict(pipe.scheduler.config) | {"time_shift_type": kind, "shift_terminal": None}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    pipe(prompt=["a"], height=64, width=32, num_inference_steps=4, output_type="latent")
    family = family_of(pipe)
    levels, size = torch.linspace(1, 0.25, 4, dtype=torch.float64), (64 // family.vae_factor, 32 // family.vae_factor)
    found = family.objective(ObjectiveSettings()).times(levels, size)
    torch.testing.assert_close(found, pipe.scheduler.sigmas[:4], atol=1e-6, rtol=0)


def test_the_shift_of_flux2_is_that_of_fifty_steps() -> None:
    pipe = build("flux2")
    pipe(prompt=["a"], height=64, width=32, num_inference_steps=50, output_type="latent")
    objective = family_of(pipe).objective(ObjectiveSettings())
    levels = torch.linspace(1, 0.02, 50, dtype=torch.float64)
    torch.testing.assert_close(objective.times(levels, (16, 8)), pipe.scheduler.sigmas[:50], atol=1e-6, rtol=0)


def test_the_shift_of_hidream_is_that_of_its_largest_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("hidream")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    told, shift = [], pipe.scheduler.time_shift
    monkeypatch.setattr(pipe.scheduler, "time_shift", lambda mu, *rest: told.append(mu) or shift(mu, *rest))
    pipe(prompt=["a"], num_inference_steps=2, output_type="latent")
    found = family_of(pipe).objective(ObjectiveSettings()).shift((16, 16))
    assert found == pytest.approx(math.exp(told[0]))


@pytest.mark.parametrize("size", [(512, 512), (1024, 768)], ids=str)
def test_ideogram_draws_at_quantiles_of_the_trained_distribution(size: tuple[int, int]) -> None:
    from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu

    family = family_of(build("ideogram4"))
    expected = _logit_normal_sigmas(4, _resolution_aware_mu(*size, base_mu=0.0), std=1.5)[1:]
    levels = torch.sigmoid(1.5 * torch.special.ndtri(torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64)))
    found = family.objective(ObjectiveSettings()).times(levels, tuple(side // family.vae_factor for side in size))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_the_shift_of_a_solver_is_its_own(kind: type[Any]) -> None:
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert scheduler_misfit(scheduler) is None
    scheduler.set_timesteps(4)
    ends = (0.999, 0.0) if kind is DPMSolverMultistepScheduler else (1.0, 0.001)
    levels = torch.linspace(*ends, 5, dtype=torch.float64)[:-1]
    found = FlowMatching(scheduler_shift(scheduler, lambda size: 0.0)).times(levels, SIZE)
    torch.testing.assert_close(found, scheduler.sigmas[:-1], atol=2e-6, rtol=0)


def test_noise_and_target_are_those_of_the_straight_path() -> None:
    objective, random = unshifted("none"), torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 4, generator=random), torch.randn(2, 3, 4, 4, generator=random)
    times = torch.tensor([0.25, 0.8])
    noisy = objective.add_noise(latents, noise, times)
    torch.testing.assert_close(noisy[0], 0.75 * latents[0] + 0.25 * noise[0])
    torch.testing.assert_close(noisy - times.view(2, 1, 1, 1) * objective.target(latents, noise, times), latents)


def test_weights_of_the_loss_are_those_of_diffusers() -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    times = torch.tensor([0.05, 0.3, 0.9])
    ones = torch.ones(3, 4, 2, 2)
    for scheme in ("logit_normal", "mode", "none", "sigma_sqrt", "cosmap"):
        found = unshifted(scheme).losses(ones, torch.zeros_like(ones), times)
        torch.testing.assert_close(found, compute_loss_weighting_for_sd3(scheme, times).expand(3).float())


def test_fixed_times_are_spread_over_all_levels() -> None:
    torch.testing.assert_close(
        unshifted("none").levels.spread(4), torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64)
    )


def test_other_schedulers_are_refused() -> None:
    assert "DDIMScheduler" in str(scheduler_misfit(build("sd").scheduler))
    assert "invert_sigmas" in str(scheduler_misfit(FlowMatchEulerDiscreteScheduler(invert_sigmas=True)))
    assert scheduler_misfit(FlowMatchEulerDiscreteScheduler()) is None
    assert "epsilon" in str(scheduler_misfit(UniPCMultistepScheduler(use_flow_sigmas=True)))
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    assert "use_lu_lambdas" in str(scheduler_misfit(DPMSolverMultistepScheduler(**flow, use_lu_lambdas=True)))


def test_the_line_of_the_shift_goes_through_the_schedulers_two_points() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.3, max_shift=0.9, base_image_seq_len=100)
    mu = shift_by_tokens(scheduler)
    assert (mu(100), mu(4096)) == (pytest.approx(0.3), pytest.approx(0.9))
