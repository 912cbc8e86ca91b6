"""A denoiser that knows the picture: the stock pipeline must draw it, and the training step must have the loss zero.

This shows a family's conventions (scaling and statistics of the latents, packing, how time is told, the sign of the
answer, what is predicted) without any trained weight. The stub uses the pipelines' own packing, never the family's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from families.tiny import DIFFUSION, FLOW, build, drawn_size, family_in_test
from torch import Tensor
from training.helpers import draw_photo

from ether_diffusion.data.augment import Augmentation
from ether_diffusion.data.plan import BatchPlan
from ether_diffusion.data.subject import SubjectFolder
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.settings import ObjectiveSettings
from ether_diffusion.training.batches import Batch, TrainingSamples, micro_batches, to_batch
from ether_diffusion.training.model import DenoisingModel

PROMPTS = ["a red dog", "two blue cats on a beach"]


def picture(height: int, width: int) -> Tensor:
    """A smooth picture, (1, 3, height, width) in [-1, 1]."""
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None, :]
    return torch.stack([rows * columns, (3 * rows).sin() + 0 * columns, 0.5 * columns + 0 * rows])[None]


def encoded(pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
    """The mean of the autoencoder's own latents."""
    if type(pipe.vae).__name__ == "AutoencoderKLQwenImage":
        return pipe.vae.encode(pixels[:, :, None]).latent_dist.mean
    found = pipe.vae.encode(pixels)
    return found.latent if "latent" in found else found.latent_dist.mean


def decoded(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """The picture of the autoencoder's own latents, in [0, 1]."""
    pixels = pipe.vae.decode(latents, return_dict=False)[0]
    return ((pixels[:, :, 0] if pixels.dim() == 5 else pixels) / 2 + 0.5).clamp(0, 1)


def as_denoised(pipe: DiffusionPipeline, x0: Tensor) -> Tensor:
    """Latents as the denoiser of the pipeline sees them, by the pipeline's own functions where it has them."""
    kind, (batch, channels, height, width) = type(pipe).__name__, x0.shape
    if kind in ("FluxPipeline", "QwenImagePipeline", "ChromaPipeline", "Krea2Pipeline"):
        return pipe._pack_latents(x0, batch, channels, height, width)
    if kind == "Flux2KleinPipeline":
        return pipe._pack_latents(x0)
    if kind == "Ideogram4Pipeline":
        return x0.flatten(2).transpose(1, 2)
    return x0[:, :, None] if kind == "ZImagePipeline" else x0


TOLD: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("StableDiffusion3Pipeline", "HiDreamImagePipeline"), lambda time: time / 1000),
    "SanaPipeline": lambda time: time / 500,  # the tiny one's scale is a half
    **dict.fromkeys(("ZImagePipeline", "Lumina2Pipeline", "Ideogram4Pipeline"), lambda time: 1 - time),
}
"""σ from what the denoiser is told as time, where that is another number."""
NEGATIVE = ("ZImagePipeline", "Lumina2Pipeline", "HiDreamImagePipeline", "Ideogram4Pipeline")
"""Pipelines whose denoiser answers x₀ - ε."""


class Stub:
    """Stands for the forward of a flow transformer: (x - x₀) / σ in the terms of its pipeline."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe, self.kind, self.x0 = pipe, type(pipe).__name__, torch.zeros(0)
        self.signature = inspect.signature(pipe.transformer.forward)
        for name in ("transformer", "unconditional_transformer"):
            if hasattr(pipe, name):
                getattr(pipe, name).forward = self

    def know(self, x0: Tensor) -> None:
        """The latents (batch, channels, h, w) that it answers with."""
        self.x0 = as_denoised(self.pipe, x0)

    def sigma(self, time: Tensor) -> Tensor:
        """Of what is told; in drawing solvers tell whole numbers, for which they have σ in a table."""
        scheduler = self.pipe.scheduler
        found: Tensor = TOLD.get(self.kind, torch.Tensor.clone)(time)
        if scheduler.config.get("use_flow_sigmas") and scheduler.num_inference_steps:
            nearest = (scheduler.timesteps / 1000 - found[0]).abs().argmin()
            return scheduler.sigmas[nearest].expand(len(found))
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        given = self.signature.bind(*args, **kwargs).arguments
        x = torch.stack(given["x"]) if "x" in given else given["hidden_states"]
        sigma = self.sigma(next(given[name] for name in ("timestep", "timesteps", "t") if name in given))
        before = x.shape[1] - self.x0.shape[1]  # Ideogram's text
        x = x[:, before:]
        answer = (x - self.x0) / sigma.view(-1, *[1] * (x.dim() - 1))
        answer = -answer if self.kind in NEGATIVE else answer
        if self.kind == "ZImagePipeline":
            return (list(answer.unbind(0)),)
        return (F.pad(answer, (0, 0, before, 0)),)


@pytest.mark.parametrize("size", [(32, 32), (48, 32)], ids=str)
@pytest.mark.parametrize("name", FLOW)
@torch.no_grad()
def test_the_stock_pipeline_draws_the_picture(name: str, size: tuple[int, int]) -> None:
    pipe = build(name)
    family, size = family_in_test(pipe), drawn_size(pipe, size)
    pixels = picture(*size)
    mean, _ = family.encode(pixels)
    Stub(pipe).know(family.scaled(mean))
    images = pipe(
        height=size[0],
        width=size[1],
        num_inference_steps=5,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **family.drawing(PROMPTS, family.GUIDANCE),
    ).images
    expected = decoded(pipe, encoded(pipe, pixels))
    torch.testing.assert_close(images, expected.expand_as(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (48, 32)], ids=str)
@pytest.mark.parametrize("name", FLOW)
@torch.no_grad()
def test_what_the_pipeline_gives_as_latents_is_decoded_to_the_same_picture(name: str, size: tuple[int, int]) -> None:
    pipe = build(name)
    family, size = family_in_test(pipe), drawn_size(pipe, size)
    asked = {
        "height": size[0],
        "width": size[1],
        "num_inference_steps": 2,
    }
    drawn, expected = (
        pipe(
            **family.drawing(["a dog"], family.GUIDANCE),
            **asked,
            output_type=kind,
            generator=torch.Generator().manual_seed(0),
        ).images
        for kind in ("latent", "pt")
    )
    pixels = family.decode(family.unscaled(drawn, *size))
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), expected, atol=1e-5, rtol=0)


def batches(family: Family, folder: Path, resolution: int, buckets: bool) -> list[Batch]:
    """Three batches of two pictures of other sizes and captions, in fp64."""
    for index, (prompt, size) in enumerate(zip([*PROMPTS, "x"], [(96, 64), (64, 96), (64, 64)], strict=True)):
        draw_photo(folder / f"{index}.png", index, size)
        (folder / f"{index}.txt").write_text(prompt)
    subject = SubjectFolder(folder, "", resolution, Augmentation(), buckets, family.divisor)
    objective = family.objective(ObjectiveSettings())
    samples = TrainingSamples(subject, "instance", 0, family, objective)
    plan = BatchPlan(subject.sizes, 2, 0)
    parts = micro_batches([(samples, plan)], (0, 3), 2, (0, 1), 0)
    made = [to_batch(part, family, objective, torch.device("cpu")) for (part,) in parts]
    return [Batch(**{**vars(b), "latents": b.latents.double(), "noise": b.noise.double()}) for b in made]


@pytest.mark.parametrize(("resolution", "buckets"), [(32, False), (48, False), (48, True)])
@pytest.mark.parametrize("name", FLOW)
def test_the_training_step_has_loss_zero(name: str, resolution: int, buckets: bool, tmp_path: Path) -> None:
    pipe = build(name)
    family = family_in_test(pipe)
    model = DenoisingModel(family, [], family.objective(ObjectiveSettings()))
    model.dtype = torch.float64
    stub, sizes = Stub(pipe), set()
    for batch in batches(family, tmp_path, resolution, buckets):
        stub.know(batch.latents)
        [losses] = model([[batch]])
        assert losses["loss"].item() <= 1e-10
        sizes.add(batch.latents.shape[2:])
    assert len(sizes) == (1 if not buckets else 3)


def alpha_bars(scheduler: Any) -> Tensor:
    """ᾱ of every timestep in fp64."""
    return torch.cumprod(1 - scheduler.betas.double(), 0)


class NoiseStub:
    """Stands for the forward of a denoiser of DDPM noise: the noise or the velocity that leads to x₀."""

    def __init__(self, pipe: DiffusionPipeline, x0: Tensor, velocity: bool) -> None:
        self.x0, self.velocity = x0, velocity
        zero = pipe.scheduler.config.get("rescale_betas_zero_snr", False)
        self.alphas = alpha_bars(diffusers.DDPMScheduler(**BETAS, rescale_betas_zero_snr=zero))
        self.transformer = hasattr(pipe, "transformer")
        denoiser = pipe.transformer if self.transformer else pipe.unet
        self.signature = inspect.signature(type(denoiser).forward.__get__(denoiser))
        denoiser.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(*args, **kwargs).arguments
        sample = given["hidden_states" if self.transformer else "sample"]
        alpha = self.alphas[torch.as_tensor(given["timestep"]).long()].reshape(-1, *[1] * 3)
        noise = (sample - alpha.sqrt() * self.x0) / (1 - alpha).sqrt()
        answer = alpha.sqrt() * noise - (1 - alpha).sqrt() * self.x0 if self.velocity else noise
        found = answer.to(sample.dtype)
        if self.transformer:  # it answers a variance, too
            found = torch.cat([found, torch.full_like(found, torch.nan)], 1)
        return (found,) if given.get("return_dict") is False else SimpleNamespace(sample=found)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def diffusion(name: str, kind: type[Any], velocity: bool, **settings: Any) -> DiffusionPipeline:
    """A pipeline with that scheduler."""
    pipe = build(name)
    predicted = "v_prediction" if velocity else "epsilon"
    settings = {"timestep_spacing": "leading", "steps_offset": 1, **settings}
    pipe.scheduler = kind(**BETAS, prediction_type=predicted, **settings)
    return pipe


ZERO: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Zero terminal SNR: drawing begins where nothing but noise is left (arXiv 2305.08891)."""
NOISES = {"epsilon": (False, {}), "v": (True, {}), "v with zero terminal SNR": (True, ZERO)}


@pytest.mark.parametrize("kind", [diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler])
@pytest.mark.parametrize(
    ("velocity", "settings"), [(False, {}), (True, {}), (True, ZERO)], ids=["epsilon", "v", "zero"]
)
@pytest.mark.parametrize("name", DIFFUSION)
@torch.no_grad()
def test_the_pipelines_of_ddpm_noise_draw_the_picture(
    name: str, velocity: bool, settings: dict[str, Any], kind: type[Any]
) -> None:
    pipe = diffusion(name, kind, velocity, **settings)
    family = family_in_test(pipe)
    x0 = family.scaled(encoded(pipe, picture(64, 64)))
    NoiseStub(pipe, x0, velocity)
    asked = {"height": 64, "width": 64, "num_inference_steps": 4, **family.drawing(PROMPTS, 1.0)}
    drawn = pipe(**asked, output_type="latent").images
    torch.testing.assert_close(drawn, x0.expand_as(drawn), atol=1e-5, rtol=0)
    images = pipe(**asked, output_type="pt").images
    expected = decoded(pipe, encoded(pipe, picture(64, 64)))
    # the autoencoder makes more of the rounding of two pictures at a time
    torch.testing.assert_close(images, expected.expand_as(images), atol=5e-5, rtol=0)


@pytest.mark.parametrize("velocity", [False, True], ids=["epsilon", "v"])
@torch.no_grad()
def test_ddim_ends_at_the_noise_of_the_first_timestep(velocity: bool) -> None:
    """With ``set_alpha_to_one=False`` the last step goes to ᾱ₀: √ᾱ₀ x₀ + √(1 - ᾱ₀) ε."""
    pipe = diffusion("sd", diffusers.DDIMScheduler, velocity, clip_sample=False, set_alpha_to_one=False)
    x0 = family_in_test(pipe).scaled(encoded(pipe, picture(64, 64)))
    NoiseStub(pipe, x0, velocity)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    drawn = pipe(prompt="a dog", latents=noise, num_inference_steps=10, output_type="latent").images
    alphas = alpha_bars(pipe.scheduler)
    first = alphas[pipe.scheduler.timesteps[0]]
    epsilon = (noise - first.sqrt() * x0) / (1 - first).sqrt()  # the stub's, the same at every step
    expected = alphas[0].sqrt() * x0 + (1 - alphas[0]).sqrt() * epsilon
    torch.testing.assert_close(drawn, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("velocity", "settings"), [(False, {}), (True, {}), (True, ZERO)], ids=["epsilon", "v", "zero"]
)
@pytest.mark.parametrize("name", DIFFUSION)
def test_the_training_step_of_ddpm_noise_has_loss_zero(
    name: str, velocity: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    pipe = diffusion(name, diffusers.DDPMScheduler, velocity, **settings)
    family = family_in_test(pipe)
    objective = family.objective(ObjectiveSettings())
    objective.noise_scheduler.alphas_cumprod = alpha_bars(objective.noise_scheduler)
    model = DenoisingModel(family, [], objective)
    model.dtype = torch.float64
    for batch in batches(family, tmp_path, 64, False):
        NoiseStub(pipe, batch.latents, velocity)
        [losses] = model([[batch]])
        assert losses["loss"].item() <= 1e-10


def test_with_zero_terminal_snr_the_last_timestep_is_noise_alone() -> None:
    pipe = diffusion("sd", diffusers.DDIMScheduler, True, **ZERO)
    family, random = family_in_test(pipe), torch.Generator().manual_seed(0)
    assert family.misfit() is None
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=random)
    last = torch.tensor([999])
    assert pipe.scheduler.alphas_cumprod[last] == 0
    for gamma in (None, 5.0):
        objective = family.objective(ObjectiveSettings(snr_gamma=gamma))
        assert torch.equal(objective.add_noise(latents, noise, last), noise)
        assert torch.equal(objective.target(latents, noise, last), -latents)
        loss = objective.losses(torch.zeros_like(latents), -latents, last)
        expected = latents.square().mean() if gamma is None else torch.tensor(0.0)  # the SNR is the weight
        torch.testing.assert_close(loss[0], expected)
    sampler = getattr(diffusers, family.SAMPLER).from_config(pipe.scheduler.config)
    sampler.set_timesteps(4)
    assert (sampler.timesteps[0], sampler.config.rescale_betas_zero_snr) == (999, True)
