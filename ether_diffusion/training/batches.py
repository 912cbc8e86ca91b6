"""Training samples: a picture's latents together with everything random that the step does to it.

All randomness of a sample is drawn from generators keyed by its number in the run. So the number of processes,
accumulation, workers, caching and resuming do not change what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import diffusers
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ether_diffusion.bars import progress
from ether_diffusion.data.cache import TensorCache, module_hash
from ether_diffusion.data.captions import Prompts
from ether_diffusion.data.control import ControlPairs
from ether_diffusion.data.plan import BatchPlan, Draw, EndlessPlan, MicroBatches
from ether_diffusion.data.randomness import generator
from ether_diffusion.data.subject import SubjectFolder
from ether_diffusion.families.protocol import Family, Objective


@dataclass(frozen=True)
class Batch:
    """Samples of one size.

    Attributes:
        latents: (batch, channels, h, w) fp32, scaled as noise is added to them.
        noise: of the same shape.
        times: (batch,) of the objective.
        prompts: of every sample.
        sizes: (batch, 6): original size, crop corner, target size, which SDXL is told.
        prior: (batch,) bool: whether a sample is a class image.
        conditions: (batch, 3, H, W) in [0, 1], where the model is trained with a control.
    """

    latents: Tensor
    noise: Tensor
    times: Tensor
    prompts: list[str]
    sizes: Tensor
    prior: Tensor
    conditions: Tensor | None = None


Pictures = TypeVar("Pictures", SubjectFolder, ControlPairs)


class TrainingSamples(Dataset[dict[str, Any]], Generic[Pictures]):
    """Pictures as training samples, addressed by :class:`ether_diffusion.data.plan.Draw`.

    Args:
        subject: the pictures: a folder, or pairs with their conditions.
        stream: "instance", "prior" or "pairs"; keeps the randomness of the two apart.
        seed: of the run.
        family: of the base: the shape of its latents.
        objective: says how much noise samples get.
        noise_offset: scale of a constant added to every channel of the noise.
        cached: :func:`encode_once` of the pictures, where nothing random precedes the latents.
    """

    def __init__(
        self,
        subject: Pictures,
        stream: str,
        seed: int,
        family: Family,
        objective: Objective,
        noise_offset: float = 0.0,
        cached: list[tuple[dict[str, Tensor], str]] | None = None,
    ) -> None:
        self.subject: Pictures = subject
        self.stream = stream
        self.seed = seed
        self.levels = objective.levels  # and not the family, which has the base: worker processes get a copy of this
        self.latent_channels, self.vae_factor = family.latent_channels, family.vae_factor
        self.noise_offset = noise_offset
        self.cached = cached
        self.prompts_of: Sequence[Prompts] | None = None  # pairs draw theirs when they are cut
        if isinstance(subject, SubjectFolder):
            self.prompts_of = subject.prompts_of

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
        if self.prompts_of is not None:
            prompt = self.prompts_of[draw.index].draw(generator(self.seed, self.stream, "caption", draw.counter))
        random = generator(self.seed, self.stream, "noise", draw.counter)
        shape = (self.latent_channels, height, width)
        level = self.levels.draw(random)
        noise = torch.randn(shape, generator=random)
        posterior_noise = torch.randn(shape, generator=random)
        offset = torch.randn(self.latent_channels, 1, 1, generator=random)
        return {
            **picture,
            "levels": level,
            "noise": noise + self.noise_offset * offset,
            "posterior_noise": posterior_noise,
            "prompts": prompt,
            "prior": torch.tensor(self.stream == "prior"),
        }


def encode_once(subject: SubjectFolder, family: Family, cache: TensorCache) -> list[tuple[dict[str, Tensor], str]]:
    """Encode every picture of a deterministic folder to mean and deviation of its latents, through the cache.

    Returns:
        For each picture its tensors and its prompt.
    """
    dependencies = {
        "kind": "latents and sizes",
        "vae": module_hash(family.pipe.vae),
        "device": family.pipe.vae.device.type,
        "versions": [torch.__version__, diffusers.__version__],
    }

    def encode(index: int) -> dict[str, Tensor]:
        picture, _ = _picture(subject, index, torch.Generator())
        mean, std = family.encode(picture.pop("pixel_values")[None])
        return {**picture, "latent_mean": mean[0], "latent_std": std[0]}

    return [
        (
            cache.get_or_compute({**dependencies, **subject.fingerprint(index)}, partial(encode, index)),
            subject.prompts_of[index].first,
        )
        for index in progress(range(len(subject)), "encoding pictures")
    ]


Plan = BatchPlan | EndlessPlan


class _Sources(Dataset[dict[str, Any]]):
    """Samples of several sources, addressed by the number of the source and the draw."""

    def __init__(self, sources: Sequence[TrainingSamples[Any]]) -> None:
        self.sources = sources

    def __getitem__(self, place: tuple[int, Draw]) -> dict[str, Any]:
        source, draw = place
        return self.sources[source][draw]


def micro_batches(
    sources: Sequence[tuple[TrainingSamples[Any], Plan]],
    steps: tuple[int, int],
    micro_batch_size: int,
    process: tuple[int, int],
    num_workers: int,
) -> Iterator[tuple[dict[str, Any], ...]]:
    """This process's share of the samples of ``steps`` (from, to), stacked: in each round one micro-batch per source.

    One pool of ``num_workers`` serves all sources. ``process`` is (index, number).
    """
    shares = [MicroBatches(plan, *steps, micro_batch_size, *process) for _, plan in sources]
    # its own generator: the loader would draw a seed for its workers from the global one
    loader = DataLoader(
        _Sources([samples for samples, _ in sources]),
        batch_sampler=_in_turn(shares),
        num_workers=num_workers,
        collate_fn=stack,
        generator=torch.Generator(),
    )
    yield from zip(*[iter(loader)] * len(sources), strict=True)


def _in_turn(shares: Sequence[MicroBatches]) -> Iterator[list[tuple[int, Draw]]]:
    """The micro-batches of the first round of every source, then of the second, …"""
    for micros in zip(*shares, strict=True):
        for source, micro in enumerate(micros):
            yield [(source, draw) for draw in micro]


def to_batch(stacked: Mapping[str, Any], family: Family, objective: Objective, device: torch.device) -> Batch:
    """Move stacked samples to the device and encode what is not encoded yet."""
    times = objective.times(stacked["levels"], tuple(stacked["noise"].shape[-2:])).to(device)
    moved = {key: value.to(device) for key, value in stacked.items() if isinstance(value, Tensor) and key != "levels"}
    if "pixel_values" in moved:
        mean, std = family.encode(moved["pixel_values"])
    else:
        mean, std = moved["latent_mean"], moved["latent_std"]
    latents = family.scaled(mean + std * moved["posterior_noise"])
    return Batch(
        latents,
        moved["noise"],
        times,
        stacked["prompts"],
        moved["sizes"].float(),
        moved["prior"],
        moved.get("conditions"),
    )


def join(batches: list[Batch]) -> list[Batch]:
    """Concatenate batches of one shape, so that instance and class images pass the denoiser together.

    Those with conditions and those without stay apart.
    """
    conditions = [batch.conditions for batch in batches]
    all_given = all(each is not None for each in conditions)
    mixed = not all_given and any(each is not None for each in conditions)
    if mixed or len({batch.latents.shape[1:] for batch in batches}) != 1:
        return batches
    return [
        Batch(
            torch.cat([batch.latents for batch in batches]),
            torch.cat([batch.noise for batch in batches]),
            torch.cat([batch.times for batch in batches]),
            [prompt for batch in batches for prompt in batch.prompts],
            torch.cat([batch.sizes for batch in batches]),
            torch.cat([batch.prior for batch in batches]),
            torch.cat([each for each in conditions if each is not None]) if all_given else None,
        )
    ]


def _picture(
    subject: SubjectFolder | ControlPairs, index: int, random: torch.Generator
) -> tuple[dict[str, Tensor], str]:
    """A picture's tensors, and its prompt."""
    example = subject.example(index, random)
    sizes = torch.tensor([*example.original_size, *example.crop_top_left, *example.target_size])
    tensors = {"pixel_values": example.pixel_values, "sizes": sizes}
    return tensors | ({} if example.condition is None else {"conditions": example.condition}), example.prompt


def stack(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of one size side by side."""
    return {
        key: [sample[key] for sample in samples] if key == "prompts" else torch.stack([s[key] for s in samples])
        for key in samples[0]
    }
