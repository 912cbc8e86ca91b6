"""The moving average of what is trained: what it is, and that it is what is saved and drawn with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from training.helpers import draw, metrics, same_tensors, samples, trained

import ether_diffusion as ether
from ether_diffusion.training.averages import Averages
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

Train = Callable[..., Path]


def averaged(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "averaged.safetensors")


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "ether_weights.safetensors")


def test_the_average_is_the_sum_that_its_formula_says(
    train: Train, base_folder: Path, settings: Callable[..., DreamBoothConfig]
) -> None:
    run = train(max_train_steps=12, checkpointing_steps=1, ema_decay=0.5)
    pipe = DiffusionPipeline.from_pretrained(base_folder)
    start = ether.attach(pipe.unet, settings().ether_config(), name="start")
    expected = {f"unet.{name}": parameter.detach().double() for name, parameter in start.named_parameters()}
    for step in range(1, 13):
        decay = min(0.5, (1 + step) / (10 + step))  # 0.5 from step 8 on
        now = trained(run, step)
        expected = {name: decay * expected[name] + (1 - decay) * now[name].double() for name in now}
        found = averaged(run, step)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


def test_training_goes_as_without_an_average(train: Train) -> None:
    common: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 2}
    run, plain = train(ema_decay=0.9, **common), train("plain", **common)
    assert metrics(run) == metrics(plain)
    for step in (2, 4):
        assert same_tensors(trained(run, step), trained(plain, step))
        assert not (plain / "checkpoints" / f"step-{step:06d}" / "averaged.safetensors").exists()


def test_the_average_is_saved_and_drawn_with(train_with_samples: Train, base_folder: Path) -> None:
    run = train_with_samples(max_train_steps=4, checkpointing_steps=2, validation_steps=2, ema_decay=0.9)
    plain = train_with_samples("plain", max_train_steps=4, checkpointing_steps=2, validation_steps=2)
    for step, folder in ((4, run), (4, run / "checkpoints" / "step-000004"), (2, run / "checkpoints" / "step-000002")):
        assert same_tensors(saved(folder), averaged(run, step))
        assert not same_tensors(saved(folder), trained(run, step))
    drawn = samples(run)
    for step in (2, 4):
        pipe = DiffusionPipeline.from_pretrained(base_folder)
        ether.load(pipe, run / "checkpoints" / f"step-{step:06d}")
        assert np.array_equal(draw(pipe), drawn[f"step-{step:06d}/00.png"])
    assert not np.array_equal(drawn["step-000004/00.png"], samples(plain)["step-000004/00.png"])
    assert np.array_equal(drawn["step-000000/00.png"], samples(plain)["step-000000/00.png"])


@pytest.mark.parametrize("extra", [{}, {"train_text_encoder": True}, {"method": "lora"}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(train: Train, extra: dict[str, Any]) -> None:
    common: dict[str, Any] = {"ema_decay": 0.8, "checkpointing_steps": 2, "validation_steps": 2, **extra}
    straight = train("straight", max_train_steps=6, **common)
    run = train(max_train_steps=4, **common)
    train(max_train_steps=6, resume="step-000002", **common)
    assert metrics(run) == metrics(straight)
    assert (run / "validation.jsonl").read_text() == (straight / "validation.jsonl").read_text()
    assert same_tensors(trained(run, 6), trained(straight, 6))
    assert same_tensors(averaged(run, 6), averaged(straight, 6))


def test_a_finished_run_that_is_resumed_without_a_step_saves_the_same(train: Train) -> None:
    run = train(ema_decay=0.8)
    before = saved(run)
    train(ema_decay=0.8, resume="latest")
    assert same_tensors(saved(run), before)


def test_an_average_that_begins_later_says_so(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    run = train(max_train_steps=2)
    with caplog.at_level(logging.WARNING):
        train(max_train_steps=4, resume="latest", ema_decay=0.9)
    assert "resuming with another setting, ema_decay: None → 0.9" in caplog.text
    assert "has no averaged.safetensors: the average begins with the weights of that step" in caplog.text
    assert same_tensors(saved(run), averaged(run, 4))


def test_an_average_that_does_not_fit_is_refused(train: Train) -> None:
    run = train(max_train_steps=2, ema_decay=0.9)
    folder = run / "checkpoints" / "step-000002"
    (folder / "averaged.safetensors").write_bytes((folder / "averaged.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-000002 is damaged \(.*averaged.safetensors"):
        train(max_train_steps=4, resume="latest", ema_decay=0.9)


def test_what_acts_meanwhile_goes_and_the_parameters_come_back_bit_for_bit() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 1 / 3]))
    averages = Averages({"a": parameter}, 0.75)
    with torch.no_grad():
        parameter.add_(torch.tensor([1.0, 2.0]))
    averages.update(100)  # late enough for the decay to be the one that is given
    before, version = parameter.detach().clone(), parameter._version
    with averages.acting():
        torch.testing.assert_close(parameter.detach(), torch.tensor([1.25, 1 / 3 + 0.5]))
        assert parameter._version > version
    assert torch.equal(parameter.detach(), before)


def test_a_run_without_an_average_has_the_hash_that_it_had(settings: Callable[..., DreamBoothConfig]) -> None:
    assert settings(ema_decay=None).hash() == settings().hash() != settings(ema_decay=0.9).hash()
