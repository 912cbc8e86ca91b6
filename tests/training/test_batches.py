"""Training samples: everything random in them depends on seed, stream and counter alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import build
from training.helpers import draw_photo, same_tensors

from ether_diffusion.data.augment import Augmentation
from ether_diffusion.data.cache import TensorCache
from ether_diffusion.data.plan import BatchPlan, Draw
from ether_diffusion.data.subject import SubjectFolder
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.settings import ObjectiveSettings
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.training.batches import Batch, TrainingSamples, encode_once, join, micro_batches, to_batch

CPU = torch.device("cpu")
FAMILY = family_of(tiny_pipeline())
OBJECTIVE = FAMILY.objective(ObjectiveSettings())


def samples(folder: Path, stream: str = "instance", seed: int = 0, **settings: Any) -> TrainingSamples:
    augmentation = settings.pop("augmentation", Augmentation())
    buckets = settings.pop("use_buckets", False)
    subject = SubjectFolder(folder, "a dog", 64, augmentation, buckets, 2)
    return TrainingSamples(subject, stream, seed, FAMILY, OBJECTIVE, **settings)


def batches(source: TrainingSamples, pipe: DiffusionPipeline, size: int, steps: tuple[int, int]) -> list[Batch]:
    plan = BatchPlan(source.subject.sizes, size, 0)
    return [
        to_batch(part, family_of(pipe), OBJECTIVE, CPU)
        for (part,) in micro_batches([(source, plan)], steps, size, (0, 1), 0)
    ]


def test_cached_latents_give_the_same_batches_bit_for_bit(
    photos: Path, pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    fresh = samples(photos)
    assert fresh.subject.deterministic
    written = encode_once(fresh.subject, family_of(pipe), TensorCache(tmp_path))
    read = encode_once(fresh.subject, family_of(pipe), TensorCache(tmp_path))
    expected = batches(fresh, pipe, 1, (0, 6))
    for cached in (written, read):
        got = batches(samples(photos, cached=cached), pipe, 1, (0, 6))
        assert len(got) == len(expected) == 6
        assert all(same_tensors(vars(a), vars(b)) for a, b in zip(got, expected, strict=True))


def test_latents_are_the_scaled_sample_of_the_encoders_distribution(photos: Path, pipe: DiffusionPipeline) -> None:
    source = samples(photos)
    item = source[Draw(1, 7)]
    posterior = pipe.vae.encode(item["pixel_values"][None]).latent_dist
    expected = (posterior.mean + posterior.std * item["posterior_noise"]) * pipe.vae.config.scaling_factor
    plan = BatchPlan([0], 1, 0)
    plan.batch = lambda step: [Draw(1, 7)]  # type: ignore[method-assign]
    [batch] = [
        to_batch(part, family_of(pipe), OBJECTIVE, CPU)
        for (part,) in micro_batches([(source, plan)], (0, 1), 1, (0, 1), 0)
    ]
    torch.testing.assert_close(batch.latents, expected.detach(), rtol=1e-6, atol=1e-7)
    assert batch.prompts == ["a dog"]


def test_noise_depends_on_seed_stream_and_counter_alone(photos: Path, wide_photos: Path) -> None:
    item = samples(photos)[Draw(0, 5)]
    keys = ("noise", "posterior_noise", "levels")
    same = [samples(photos)[Draw(2, 5)], samples(wide_photos)[Draw(1, 5)]]
    other = [
        samples(photos)[Draw(0, 6)],
        samples(photos, seed=1)[Draw(0, 5)],
        samples(photos, stream="prior")[Draw(0, 5)],
    ]
    assert [torch.equal(item[key], twin[key]) for twin in same for key in keys] == [True] * 6
    assert [torch.equal(item[key], twin[key]) for twin in other for key in keys[:2]] == [False] * 6
    assert not torch.equal(item["noise"], item["posterior_noise"])


def test_timesteps_are_uniform_over_the_schedule(photos: Path) -> None:
    source = samples(photos)
    drawn = torch.stack([source[Draw(0, counter)]["levels"] for counter in range(400)]).double()
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    # four standard errors of the mean of 400 draws
    assert abs(float(drawn.mean()) - 499.5) < 4 * (1000**2 / 12 / 400) ** 0.5


def test_the_noise_offset_is_one_constant_per_channel(photos: Path) -> None:
    plain = samples(photos)[Draw(0, 3)]["noise"].double()
    shifts = [samples(photos, noise_offset=scale)[Draw(0, 3)]["noise"].double() - plain for scale in (0.1, 0.2)]
    constants = shifts[0].mean((1, 2))
    torch.testing.assert_close(shifts[0], constants[:, None, None].expand_as(plain), rtol=0, atol=5e-7)
    torch.testing.assert_close(shifts[1], 2 * shifts[0], rtol=0, atol=1e-6)
    assert len({round(float(value), 4) for value in constants}) == 4


def test_augmentation_is_fresh_in_every_pass_and_repeatable(wide_photos: Path) -> None:
    augmentation = Augmentation(random_flip=True)
    source, twin = (samples(wide_photos, augmentation=augmentation) for _ in range(2))
    passes = [source[Draw(0, counter)] for counter in range(8)]
    assert len({tuple(item["pixel_values"].flatten().tolist()) for item in passes}) > 1
    assert same_tensors(passes[3], twin[Draw(0, 3)])


def test_sizes_are_original_size_crop_and_target_size(tmp_path: Path, pipe: DiffusionPipeline) -> None:
    """In the order of SDXL: (height, width) of the photo, (top, left) of the crop, (height, width) of the sample."""
    draw_photo(tmp_path / "a.png", 1, size=(160, 80))  # scaled to 128 × 64, of which the middle 64 columns remain
    source = samples(tmp_path, augmentation=Augmentation(center_crop=True))
    [batch] = batches(source, pipe, 1, (0, 1))
    assert batch.sizes.tolist() == [[80, 160, 0, 32, 64, 64]]


def test_buckets_give_latents_of_the_photos_shapes(wide_photos: Path, pipe: DiffusionPipeline) -> None:
    source = samples(wide_photos, use_buckets=True)
    for batch in batches(source, pipe, 2, (0, 4)):
        assert batch.latents.shape == batch.noise.shape
        [size] = {(2 * batch.latents.shape[2], 2 * batch.latents.shape[3])}
        assert {tuple(row[4:].int().tolist()) for row in batch.sizes} == {size}


def batch_of(size: int, side: int, prior: bool) -> Batch:
    generator = torch.Generator().manual_seed(10 * size + side)
    latents, noise = (torch.randn(size, 4, side, side, generator=generator) for _ in range(2))
    times, sizes = torch.arange(size), torch.rand(size, 6, generator=generator)
    return Batch(latents, noise, times, [f"{side}-{i}" for i in range(size)], sizes, torch.full((size,), prior))


def test_batches_of_one_shape_are_joined_field_by_field() -> None:
    first, second = batch_of(2, 8, prior=False), batch_of(3, 8, prior=True)
    [joined] = join([first, second])
    for name in ("latents", "noise", "times", "sizes", "prior"):
        torch.testing.assert_close(getattr(joined, name)[:2], getattr(first, name), rtol=0, atol=0)
        torch.testing.assert_close(getattr(joined, name)[2:], getattr(second, name), rtol=0, atol=0)
    assert joined.prompts == ["8-0", "8-1", "8-0", "8-1", "8-2"]


def test_batches_of_different_shapes_stay_apart() -> None:
    first, second = batch_of(2, 8, prior=False), batch_of(2, 16, prior=True)
    assert join([first, second]) == [first, second]


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_share_a_step_without_gap_or_overlap(workers: int, photos: Path) -> None:
    source = samples(photos)
    plan = BatchPlan(source.subject.sizes, 8, 0)

    def noises(size: int, process: tuple[int, int]) -> list[torch.Tensor]:
        parts = micro_batches([(source, plan)], (1, 2), size, process, workers)
        return [noise for (part,) in parts for noise in part["noise"]]

    whole = noises(8, (0, 1))
    shares = [noises(2, (rank, 2)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 4
    # round r of process p is at (2 r + p) of the step's four micro-batches of two
    order = [shares[0][:2], shares[1][:2], shares[0][2:], shares[1][2:]]
    assert same_tensors([noise for part in order for noise in part], whole)


def test_one_pool_of_workers_serves_all_sources(
    photos: Path, wide_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [samples(photos), samples(photos, stream="prior"), samples(wide_photos, use_buckets=True)]
    plans = [BatchPlan(source.subject.sizes, 2, seed) for seed, source in enumerate(sources)]
    pairs = list(zip(sources, plans, strict=True))
    alone = [[part for (part,) in micro_batches([pair], (1, 4), 1, (0, 1), 0)] for pair in pairs]
    started: list[BaseProcess] = []
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", count_starts(started))
    for workers in (0, 2):
        started.clear()
        together = list(micro_batches(pairs, (1, 4), 1, (0, 1), workers))
        assert same_tensors([list(each) for each in zip(*together, strict=True)], alone)
        assert len(started) == workers


def count_starts(started: list[BaseProcess]) -> Callable[[BaseProcess], None]:
    """``Process.start`` that notes which processes it starts."""
    original = BaseProcess.start

    def start(process: BaseProcess) -> None:
        started.append(process)
        original(process)

    return start


def test_worker_processes_get_no_base(photos: Path) -> None:
    """Where they do not fork they get a pickled copy of the samples."""
    flow = family_of(build("flux"))
    for family in (FAMILY, flow):
        subject = samples(photos).subject
        source = TrainingSamples(subject, "instance", 0, family, family.objective(ObjectiveSettings()))
        copied = pickle.dumps(source)
        assert len(copied) < 100_000
        assert same_tensors(pickle.loads(copied)[Draw(0, 3)], source[Draw(0, 3)])
