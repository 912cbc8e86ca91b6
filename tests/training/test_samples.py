"""Samples: what they are named, that they leave the training state alone, and that they never end a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline
from training.helpers import PROMPT, draw, pixels, provenance, same_tensors, samples

from ether_diffusion.families.registry import family_of
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.samples import Sampler

Train = Callable[..., Path]
Settings = Callable[..., DreamBoothConfig]


def test_every_prompt_is_drawn_with_every_seed(train: Train, base_folder: Path) -> None:
    run = train(
        validation_prompt=["a dog", "a cat"],
        num_validation_images=2,
        validation_seed=5,
        max_train_steps=1,
        resolution=64,
    )
    listing = json.loads((run / "samples" / "prompts.json").read_text())
    expected = [("a dog", 5), ("a dog", 6), ("a cat", 5), ("a cat", 6)]
    assert [(row["prompt"], row["seed"]) for row in listing] == expected
    for row in listing:
        drawn = draw(DiffusionPipeline.from_pretrained(base_folder), row["prompt"], row["seed"])
        assert np.array_equal(pixels(run / "samples" / "step-000000" / row["file"]), drawn)


def test_samples_come_at_the_start_every_n_steps_and_at_the_end(train: Train) -> None:
    run = train(max_train_steps=5, validation_steps=2, num_validation_images=1, resolution=16)
    assert list(samples(run)) == [f"step-{step:06d}/00.png" for step in (0, 2, 4, 5)]


def test_the_sampler_is_the_one_asked_for(settings: Settings, base_folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(base_folder)
    images = {
        name: np.array(
            Sampler(family_of(pipe), settings(sampler=name, resolution=64), Accelerator()).images([PROMPT], [3])[0]
        )
        for name in ("base", "DDIMScheduler", "DPMSolverMultistepScheduler")
    }
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert np.array_equal(images["base"], images["DDIMScheduler"])
    assert np.array_equal(images["DPMSolverMultistepScheduler"], draw(pipe, PROMPT, 3))
    assert not np.array_equal(images["base"], images["DPMSolverMultistepScheduler"])


def test_sampling_evaluates_and_leaves_modes_dtypes_and_the_global_generator_as_they_were(
    settings: Settings, pipe: DiffusionPipeline
) -> None:
    pipe.unet.train()
    pipe.vae.eval()
    pipe.text_encoder.eval()
    weights = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    generator, scheduler = torch.get_rng_state(), dict(pipe.scheduler.config)
    modes: list[bool] = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, inputs: modes.append(unet.training))
    Sampler(family_of(pipe), settings(), Accelerator()).images([PROMPT], [0])
    hook.remove()
    assert modes == [False, False]
    assert (pipe.unet.training, pipe.vae.training, pipe.text_encoder.training) == (True, False, False)
    assert same_tensors(weights, dict(pipe.unet.state_dict()))
    assert torch.equal(generator, torch.get_rng_state())
    assert dict(pipe.scheduler.config) == scheduler


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_running_out_of_memory_costs_a_grid_and_not_the_run(
    error: type[Exception], train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, calls = Sampler.images, 0

    def images(self: Sampler, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error("out of memory")
        return original(self, *args)

    monkeypatch.setattr(Sampler, "images", images)
    run = train(validation_steps=2, max_train_steps=3, num_validation_images=1, resolution=16)
    assert list(samples(run)) == ["step-000000/00.png", "step-000003/00.png"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["prompts.json", "step-000000", "step-000003"]
    assert "out of memory while sampling at step 2; training goes on without this grid" in caplog.text
    assert provenance(run)["status"] == "finished"
