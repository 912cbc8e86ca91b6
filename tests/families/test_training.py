"""The whole program on every family: it learns, its result draws the same pictures, and it resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import FLOW, build
from PIL import Image
from safetensors.torch import load_file
from training.helpers import draw_photo, metrics, relative_change, same_tensors, trained

import ether_diffusion as ether
from ether_diffusion.families.parts import denoiser_of
from ether_diffusion.families.registry import family_of
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.drawing import load_pipeline
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.program import ALWAYS_RIGHT

Train = Callable[..., Path]

SEVERAL = tuple(FLOW) if os.environ.get("ETHER_ALL_FAMILIES") else ("sd3", "flux", "qwen_image", "z_image")
"""What takes longest is tried on these; on all families with ``ETHER_ALL_FAMILIES=1``."""


def compared(run: Path) -> dict[int, float]:
    """The loss on the fixed pictures by step."""
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photos of the subject that no training sees."""
    folder = tmp_path_factory.mktemp("held out")
    for shade in (3, 4):
        draw_photo(folder / f"{shade}.png", shade)
    return folder


@pytest.mark.parametrize("family", FLOW)
def test_twenty_steps_lower_the_loss_on_held_out_pictures(family: str, train: Train, held_out: Path) -> None:
    run = train(family, max_train_steps=20, validation_steps=10, train_batch_size=4, validation_data_dir=held_out)
    losses = compared(run)
    assert list(losses) == [0, 10, 20]
    assert losses[20] < losses[0]


def draw(pipe: DiffusionPipeline, prompt: str, seed: int, side: int, steps: int) -> np.ndarray:
    """As a user would, with the pipeline's own defaults of guidance."""
    family = family_of(pipe)
    image = pipe(
        height=side,
        width=side,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed)],
        **family.drawing([prompt], family.GUIDANCE),
    ).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("family", FLOW)
def test_a_stock_pipeline_with_the_adapter_draws_the_samples_of_the_run(
    family: str, train: Train, base: Callable[[str], Path]
) -> None:
    run = train(family, max_train_steps=6, num_validation_images=1, num_inference_steps=3, learning_rate=0.3)
    sample = np.asarray(Image.open(run / "samples" / "step-000006" / "00.png")).astype(int)
    before = np.asarray(Image.open(run / "samples" / "step-000000" / "00.png")).astype(int)
    prompt = json.loads((run / "samples" / "prompts.json").read_text())[0]["prompt"]
    pipe = load_pipeline(Base(str(base(family))))
    pipe.set_progress_bar_config(disable=True)
    assert np.abs(draw(pipe, prompt, 0, 32, 3) - before).max() <= 1
    ether.load(pipe, run)
    assert np.abs(draw(pipe, prompt, 0, 32, 3) - sample).max() <= 1
    assert np.abs(sample - before).max() > 2
    weights = {name: value.clone() for name, value in denoiser_of(pipe).state_dict().items()}
    ether.fuse(pipe)
    assert np.abs(draw(pipe, prompt, 0, 32, 3) - sample).max() <= 1
    ether.unfuse(pipe)
    assert same_tensors(denoiser_of(pipe).state_dict(), weights)
    ether.disable(pipe)
    assert np.abs(draw(pipe, prompt, 0, 32, 3) - before).max() <= 1


@pytest.mark.parametrize("family", SEVERAL)
def test_a_resumed_run_is_the_uninterrupted_one(family: str, train: Train) -> None:
    common: dict[str, Any] = {"checkpointing_steps": 2, "validation_steps": 2, "train_batch_size": 2}
    whole = train(family, "whole", max_train_steps=4, **common)
    train(family, "parts", max_train_steps=2, **common)
    parts = train(family, "parts", max_train_steps=4, resume="latest", **common)
    assert same_tensors(trained(parts, 4), trained(whole, 4))
    assert metrics(parts) == metrics(whole)
    assert compared(parts) == compared(whole)


@pytest.mark.parametrize("family", SEVERAL)
def test_subjects_side_by_side_are_what_each_is_alone(family: str, train: Train, tmp_path: Path) -> None:
    """With small steps and a large ε, which keep Adam from blowing up roundings."""
    kind = family_of(build(family))
    for number, name in enumerate(("black_dog", "cat", "teapot", "bag")):
        draw_photo(tmp_path / "subjects" / name / "0.png", number)
        (tmp_path / "subjects" / name / "prompt.txt").write_text(f"a photo of qwe {name}"[: 20 + 3 * number])
    common: dict[str, Any] = {"max_train_steps": 2, "learning_rate": 1e-2, "adam_epsilon": 1e-3}
    if kind.PER_SAMPLE is not None:
        with pytest.raises(ValueError, match="train the subjects one by one"):
            train(family, "all", instance_data_dir=Path(), subjects_dir=tmp_path / "subjects", instance_prompt="x")
        return
    together = train(
        family, "all", instance_data_dir=Path(), subjects_dir=tmp_path / "subjects", instance_prompt="x", **common
    )
    for folder in sorted((tmp_path / "subjects").iterdir()):
        prompt = (folder / "prompt.txt").read_text()
        alone = train(family, folder.name, instance_data_dir=folder, instance_prompt=prompt, **common)
        assert (
            relative_change(
                *(load_file(each / "ether_weights.safetensors") for each in (together / folder.name, alone))
            )
            < 1e-5
        )


CASES: dict[str, dict[str, Any]] = {
    "prior, buckets, checkpointing": {
        "with_prior_preservation": True,
        "class_prompt": "a dog",
        "num_class_images": 2,
        "aspect_ratio_buckets": True,
        "gradient_checkpointing": True,
        "num_inference_steps": 2,
    },
    "LoRA": {"method": "lora", "learning_rate": 1e-3},
    "text encoders": {"train_text_encoder": True},
    "uniform sigma": {"weighting_scheme": "none", "noise_offset": 0.1},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", SEVERAL)
def test_the_settings_of_the_program_work(family: str, case: str, train: Train) -> None:
    changes = dict(CASES[case])
    if family_of(build(family)).CHECKPOINTING is not None:
        changes.pop("gradient_checkpointing", None)
    run = train(family, max_train_steps=2, **changes)
    assert [row["step"] for row in metrics(run)] == [1, 2]
    assert (run / "README.md").is_file()
    assert (run / "report.html").is_file()


def test_settings_of_another_family_are_refused(settings: Callable[..., DreamBoothConfig], train: Train) -> None:
    with pytest.raises(RuntimeError, match=r"snr_gamma is no setting for FLUX\.1: leave it out; Stable Diffusion"):
        train("flux", snr_gamma=5.0)
    with pytest.raises(RuntimeError, match="guidance_scale_training is no setting for Stable Diffusion 1"):
        train("sd", guidance_scale_training=2.0)


def test_a_resolution_that_patches_do_not_divide_is_told_before_weights_are_read(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ether_diffusion.training.program.load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(ValueError, match="resolution 40 is not a positive multiple of 16; use 32 or 48"):
        train("lumina2", resolution=40)


@pytest.mark.parametrize("family", FLOW)
def test_some_resolutions_are_right_for_every_family(family: str) -> None:
    assert ALWAYS_RIGHT % family_of(build(family)).divisor == 0
