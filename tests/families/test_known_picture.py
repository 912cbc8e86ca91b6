"""A denoiser that knows the picture: the stock pipeline must draw it, and the training step must have the loss zero.

This shows a family's conventions (scaling and statistics of the latents, packing, how time is told, the sign of the
answer, what is predicted) without any trained weight. The stub uses the pipelines' own packing, never the family's.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import FLOW, build
from torch import Tensor
from training.helpers import draw_photo

from ether_diffusion.data.augment import Augmentation
from ether_diffusion.data.plan import BatchPlan
from ether_diffusion.data.subject import SubjectFolder
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import family_of
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
    return pipe.vae.encode(pixels).latent_dist.mean


def decoded(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """The picture of the autoencoder's own latents, in [0, 1]."""
    pixels = pipe.vae.decode(latents, return_dict=False)[0]
    return ((pixels[:, :, 0] if pixels.dim() == 5 else pixels) / 2 + 0.5).clamp(0, 1)


def as_denoised(pipe: DiffusionPipeline, x0: Tensor) -> Tensor:
    """Latents as the denoiser of the pipeline sees them, by the pipeline's own functions."""
    kind, (batch, channels, height, width) = type(pipe).__name__, x0.shape
    if kind in ("FluxPipeline", "QwenImagePipeline"):
        return pipe._pack_latents(x0, batch, channels, height, width)
    if kind == "Flux2KleinPipeline":
        return pipe._pack_latents(x0)
    return x0[:, :, None] if kind == "ZImagePipeline" else x0


class Stub:
    """Stands for the forward of a flow transformer: (x - x₀) / σ in the terms of its pipeline."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe, self.kind, self.x0 = pipe, type(pipe).__name__, torch.zeros(0)
        self.signature = inspect.signature(pipe.transformer.forward)
        pipe.transformer.forward = self

    def know(self, x0: Tensor) -> None:
        """The latents (batch, channels, h, w) that it answers with."""
        self.x0 = as_denoised(self.pipe, x0)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        given = self.signature.bind(*args, **kwargs).arguments
        if self.kind == "ZImagePipeline":
            x, sigma = torch.stack(given["x"]), 1 - given["t"]
        else:
            x, sigma = given["hidden_states"], given["timestep"]
        sigma = sigma / 1000 if self.kind == "StableDiffusion3Pipeline" else sigma
        velocity = (x - self.x0) / sigma.view(-1, *[1] * (x.dim() - 1))
        return (list((-velocity).unbind(0)),) if self.kind == "ZImagePipeline" else (velocity,)


@pytest.mark.parametrize("size", [(32, 32), (48, 32)], ids=str)
@pytest.mark.parametrize("name", FLOW)
@torch.no_grad()
def test_the_stock_pipeline_draws_the_picture(name: str, size: tuple[int, int]) -> None:
    pipe = build(name)
    family = family_of(pipe)
    pixels = picture(*size)
    mean, _ = family.encode(pixels)
    Stub(pipe).know(family.scaled(mean))
    images = pipe(
        prompt=list(PROMPTS),
        height=size[0],
        width=size[1],
        num_inference_steps=5,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **family.drawing(family.GUIDANCE, len(PROMPTS)),
    ).images
    expected = decoded(pipe, encoded(pipe, pixels))
    torch.testing.assert_close(images, expected.expand_as(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (48, 32)], ids=str)
@pytest.mark.parametrize("name", FLOW)
@torch.no_grad()
def test_what_the_pipeline_gives_as_latents_is_decoded_to_the_same_picture(name: str, size: tuple[int, int]) -> None:
    pipe = build(name)
    family = family_of(pipe)
    asked = {
        "height": size[0],
        "width": size[1],
        "num_inference_steps": 2,
        **family.drawing(family.GUIDANCE, 1),
    }
    drawn = pipe(prompt=["a dog"], **asked, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    expected = pipe(prompt=["a dog"], **asked, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    pixels = family.decode(family.unscaled(drawn, *size))
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), expected, atol=1e-5, rtol=0)


def batches(family: Family, folder: Path, resolution: int, buckets: bool) -> list[Batch]:
    """Three batches of two pictures of other sizes and captions, in fp64."""
    for index, (prompt, size) in enumerate(zip([*PROMPTS, "x"], [(96, 64), (64, 96), (64, 64)], strict=True)):
        draw_photo(folder / f"{index}.png", index, size)
        (folder / f"{index}.txt").write_text(prompt)
    subject = SubjectFolder(folder, "", resolution, Augmentation(), buckets, family.divisor)
    samples = TrainingSamples(subject, "instance", 0, family, family.objective(ObjectiveSettings()))
    plan = BatchPlan(subject.sizes, 2, 0)
    parts = micro_batches([(samples, plan)], (0, 3), 2, (0, 1), 0)
    made = [to_batch(part, family, torch.device("cpu")) for (part,) in parts]
    return [Batch(**{**vars(b), "latents": b.latents.double(), "noise": b.noise.double()}) for b in made]


@pytest.mark.parametrize(("resolution", "buckets"), [(32, False), (48, False), (48, True)])
@pytest.mark.parametrize("name", FLOW)
def test_the_training_step_has_loss_zero(name: str, resolution: int, buckets: bool, tmp_path: Path) -> None:
    pipe = build(name)
    family = family_of(pipe)
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


class UNetStub:
    """Stands for the forward of a UNet: the noise or the velocity that leads to x₀."""

    def __init__(self, pipe: DiffusionPipeline, x0: Tensor, velocity: bool) -> None:
        self.x0, self.velocity, self.alphas = x0, velocity, alpha_bars(diffusers.DDPMScheduler(**BETAS))
        pipe.unet.forward = self

    def __call__(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        alpha = self.alphas[torch.as_tensor(timestep).long()].reshape(-1, *[1] * 3)
        noise = (sample - alpha.sqrt() * self.x0) / (1 - alpha).sqrt()
        answer = alpha.sqrt() * noise - (1 - alpha).sqrt() * self.x0 if self.velocity else noise
        found = answer.to(sample.dtype)
        return (found,) if kwargs.get("return_dict") is False else SimpleNamespace(sample=found)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def diffusion(name: str, kind: type[Any], velocity: bool, **settings: Any) -> DiffusionPipeline:
    """A pipeline of SD or SDXL with that scheduler."""
    pipe = build(name)
    predicted = "v_prediction" if velocity else "epsilon"
    pipe.scheduler = kind(**BETAS, prediction_type=predicted, timestep_spacing="leading", steps_offset=1, **settings)
    return pipe


@pytest.mark.parametrize("kind", [diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler])
@pytest.mark.parametrize("velocity", [False, True], ids=["epsilon", "v"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
@torch.no_grad()
def test_the_pipelines_of_ddpm_noise_draw_the_picture(name: str, velocity: bool, kind: type[Any]) -> None:
    pipe = diffusion(name, kind, velocity)
    x0 = family_of(pipe).scaled(encoded(pipe, picture(64, 64)))
    UNetStub(pipe, x0, velocity)
    asked = {"prompt": PROMPTS, "height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 1.0}
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
    x0 = family_of(pipe).scaled(encoded(pipe, picture(64, 64)))
    UNetStub(pipe, x0, velocity)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    drawn = pipe(prompt="a dog", latents=noise, num_inference_steps=10, output_type="latent").images
    alphas = alpha_bars(pipe.scheduler)
    first = alphas[pipe.scheduler.timesteps[0]]
    epsilon = (noise - first.sqrt() * x0) / (1 - first).sqrt()  # the stub's, the same at every step
    expected = alphas[0].sqrt() * x0 + (1 - alphas[0]).sqrt() * epsilon
    torch.testing.assert_close(drawn, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("velocity", [False, True], ids=["epsilon", "v"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_training_step_of_ddpm_noise_has_loss_zero(name: str, velocity: bool, tmp_path: Path) -> None:
    pipe = diffusion(name, diffusers.DDPMScheduler, velocity)
    family = family_of(pipe)
    objective = family.objective(ObjectiveSettings())
    objective.noise_scheduler.alphas_cumprod = alpha_bars(objective.noise_scheduler)
    model = DenoisingModel(family, [], objective)
    model.dtype = torch.float64
    for batch in batches(family, tmp_path, 64, False):
        UNetStub(pipe, batch.latents, velocity)
        [losses] = model([[batch]])
        assert losses["loss"].item() <= 1e-10
