"""Training samples: a picture's latents together with everything random that the step does to it.

All randomness of a sample is drawn from generators keyed by its number in the run. So the number of processes,
accumulation, workers, caching and resuming do not change what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ether_diffusion.data.cache import TensorCache, module_hash
from ether_diffusion.data.control import ControlPairs
from ether_diffusion.data.plan import BatchPlan, Draw, EndlessPlan, MicroBatches
from ether_diffusion.data.randomness import generator
from ether_diffusion.data.subject import SubjectFolder


@dataclass(frozen=True)
class Batch:
    """Samples of one size.

    Attributes:
        latents: (batch, channels, h, w) fp32, scaled as the UNet takes them.
        noise: of the same shape.
        timesteps: (batch,) int64.
        prompts: of every sample.
        time_ids: (batch, 6): original size, crop corner, target size, which SDXL is told.
        prior: (batch,) bool: whether a sample is a class image.
        conditions: (batch, 3, H, W) in [0, 1], where the model is trained with a control.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: list[str]
    time_ids: Tensor
    prior: Tensor
    conditions: Tensor | None = None


Pictures = TypeVar("Pictures", SubjectFolder, ControlPairs)


class TrainingSamples(Dataset[dict[str, Any]], Generic[Pictures]):
    """Pictures as training samples, addressed by :class:`ether_diffusion.data.plan.Draw`.

    Args:
        subject: the pictures: a folder, or pairs with their conditions.
        stream: "instance", "prior" or "pairs"; keeps the randomness of the two apart.
        seed: of the run.
        latent_channels: of the autoencoder.
        vae_factor: pixels per latent.
        num_timesteps: of the noise schedule.
        noise_offset: scale of a constant added to every channel of the noise.
        cached: :func:`encode_once` of the pictures, where nothing random precedes the latents.
    """

    def __init__(
        self,
        subject: Pictures,
        stream: str,
        seed: int,
        latent_channels: int,
        vae_factor: int,
        num_timesteps: int,
        noise_offset: float = 0.0,
        cached: list[tuple[dict[str, Tensor], str]] | None = None,
    ) -> None:
        self.subject: Pictures = subject
        self.stream = stream
        self.seed = seed
        self.latent_channels = latent_channels
        self.vae_factor = vae_factor
        self.num_timesteps = num_timesteps
        self.noise_offset = noise_offset
        self.cached = cached

    def __len__(self) -> int:
        return len(self.subject)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        if self.cached is not None:
            picture, prompt = self.cached[draw.index]
            height, width = picture["latent_mean"].shape[1:]
        else:
            random = generator(self.seed, self.stream, "augment", draw.counter)
            picture, prompt = _picture(self.subject, draw.index, random)
            height, width = (side // self.vae_factor for side in picture["pixel_values"].shape[1:])
        random = generator(self.seed, self.stream, "noise", draw.counter)
        shape = (self.latent_channels, height, width)
        timestep = torch.randint(self.num_timesteps, (), generator=random)
        noise = torch.randn(shape, generator=random)
        posterior_noise = torch.randn(shape, generator=random)
        offset = torch.randn(self.latent_channels, 1, 1, generator=random)
        return {
            **picture,
            "timesteps": timestep,
            "noise": noise + self.noise_offset * offset,
            "posterior_noise": posterior_noise,
            "prompts": prompt,
            "prior": torch.tensor(self.stream == "prior"),
        }


def encode_once(
    subject: SubjectFolder, vae: AutoencoderKL, cache: TensorCache, show: bool
) -> list[tuple[dict[str, Tensor], str]]:
    """Encode every picture of a deterministic folder to mean and deviation of its latents, through the cache.

    Returns:
        For each picture its tensors and its prompt.
    """
    dependencies = {
        "kind": "latents",
        "vae": module_hash(vae),
        "device": vae.device.type,
        "versions": [torch.__version__, diffusers.__version__],
    }

    def encode(index: int) -> dict[str, Tensor]:
        picture, _ = _picture(subject, index, torch.Generator())
        mean, std = encode_pixels(vae, picture.pop("pixel_values")[None])
        return {**picture, "latent_mean": mean[0], "latent_std": std[0]}

    return [
        (
            cache.get_or_compute({**dependencies, **subject.fingerprint(index)}, partial(encode, index)),
            subject.prompts[index],
        )
        for index in tqdm(range(len(subject)), desc="encoding pictures", disable=not show)
    ]


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (batch, channels, h, w) of the latents of ``pixel_values`` (batch, 3, H, W) in [-1, 1]."""
    posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    return posterior.mean, posterior.std


def micro_batches(
    samples: TrainingSamples[Any],
    plan: BatchPlan | EndlessPlan,
    steps: tuple[int, int],
    micro_batch_size: int,
    process: tuple[int, int],
    num_workers: int,
) -> Iterator[dict[str, Any]]:
    """This process's share of the samples of ``steps`` (from, to), stacked; ``process`` is (index, number)."""
    sampler = MicroBatches(plan, *steps, micro_batch_size, *process)
    # its own generator: the loader would draw a seed for its workers from the global one
    loader = DataLoader(
        samples, batch_sampler=sampler, num_workers=num_workers, collate_fn=_stack, generator=torch.Generator()
    )
    yield from loader


def to_batch(stacked: Mapping[str, Any], vae: AutoencoderKL, device: torch.device) -> Batch:
    """Move stacked samples to the device and encode what is not encoded yet."""
    moved = {key: value.to(device) for key, value in stacked.items() if isinstance(value, Tensor)}
    if "pixel_values" in moved:
        mean, std = encode_pixels(vae, moved["pixel_values"])
    else:
        mean, std = moved["latent_mean"], moved["latent_std"]
    latents = (mean + std * moved["posterior_noise"]).float() * vae.config.scaling_factor
    return Batch(
        latents,
        moved["noise"],
        moved["timesteps"],
        stacked["prompts"],
        moved["time_ids"].float(),
        moved["prior"],
        moved.get("conditions"),
    )


def join(batches: list[Batch]) -> list[Batch]:
    """Concatenate batches of one shape, so that instance and class images pass the UNet together."""
    if len({batch.latents.shape[1:] for batch in batches}) != 1:
        return batches
    return [
        Batch(
            torch.cat([batch.latents for batch in batches]),
            torch.cat([batch.noise for batch in batches]),
            torch.cat([batch.timesteps for batch in batches]),
            [prompt for batch in batches for prompt in batch.prompts],
            torch.cat([batch.time_ids for batch in batches]),
            torch.cat([batch.prior for batch in batches]),
        )
    ]


def _picture(
    subject: SubjectFolder | ControlPairs, index: int, random: torch.Generator
) -> tuple[dict[str, Tensor], str]:
    """A picture's tensors, and its prompt."""
    example = subject.example(index, random)
    time_ids = torch.tensor([*example.original_size, *example.crop_top_left, *example.target_size])
    tensors = {"pixel_values": example.pixel_values, "time_ids": time_ids}
    return tensors | ({} if example.condition is None else {"conditions": example.condition}), example.prompt


def _stack(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: [sample[key] for sample in samples] if key == "prompts" else torch.stack([s[key] for s in samples])
        for key in samples[0]
    }
