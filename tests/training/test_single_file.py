"""Training on a base in one file: bit for bit that on the folder, recorded by name and hash, and loaded again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from single_files import original, settings_alone, write
from torch import nn
from training.helpers import pixels, provenance, same_tensors, samples, trained

from ether_diffusion.cli.programs.sample import main as sample_main
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.runs.drawing import load_pipeline, load_run, own_guidance
from ether_diffusion.runs.model_card import loading_code
from ether_diffusion.runs.record import read_run
from ether_diffusion.training import program as training_program
from ether_diffusion.training.base_model import BaseModelError, describe_base
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.sections import BaseSection

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def single(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings that name the tiny base as one file."""
    place = tmp_path_factory.mktemp("single")
    pipe = DiffusionPipeline.from_pretrained(base_folder, safety_checker=None, requires_safety_checker=False)
    file = write(original(pipe), place / "community.safetensors")
    settings = settings_alone(base_folder, place / "settings")
    return {"pretrained_model_name_or_path": str(file), "base_config": str(settings)}


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that begin at addresses of one kind: where they lie in a file decides in which order a CPU adds."""
    original_load = training_program.load_base

    def load(*arguments: Any) -> DiffusionPipeline:
        pipe = original_load(*arguments)
        for part in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
            for tensor in chain(part.parameters(), part.buffers()):
                tensor.data = tensor.data.clone()
        return pipe

    monkeypatch.setattr(training_program, "load_base", load)


@pytest.mark.usefixtures("aligned")
def test_a_run_on_a_file_is_that_on_the_folder(
    train_with_samples: Train, single: dict[str, str], tmp_path: Path
) -> None:
    """Weights and samples are equal bit for bit; ``ether sample``, which reads the files, draws alike to rounding."""
    changes = {"max_train_steps": 2, "train_text_encoder": True, "learning_rate": 0.05}
    on_folder = train_with_samples("folder", **changes)
    on_file = train_with_samples("file", **changes, **single)
    assert same_tensors(trained(on_file, 2), trained(on_folder, 2))
    assert same_tensors(samples(on_file), samples(on_folder))
    assert provenance(on_file)["base_hash"] == provenance(on_folder)["base_hash"]
    file = Path(single["pretrained_model_name_or_path"])
    recorded = provenance(on_file)
    assert recorded["base_file"] == {
        "name": "community.safetensors",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert recorded["base_model"] == "community.safetensors"
    assert str(file.parent) not in json.dumps(recorded)
    assert recorded["base_file"]["sha256"] in (on_file / "report.html").read_text(encoding="utf-8")
    card = (on_file / "README.md").read_text(encoding="utf-8")
    assert 'pipe = load_single_file("path/to/community.safetensors", "path/to/settings")' in card
    assert str(file.parent) not in card
    for run in (on_folder, on_file):
        sample_main(
            [str(run), "--seeds", "5", "--strengths", "0", "1", "--output_dir", str(tmp_path / f"drawn-{run.name}")]
        )
    drawn = [sorted((tmp_path / f"drawn-{name}").glob("*seed5*.png")) for name in ("folder", "file")]
    assert len(drawn[0]) == 2
    for one, other in zip(*drawn, strict=True):
        assert np.abs(pixels(one).astype(int) - pixels(other)).max() <= 1


def test_the_code_of_the_card_runs(
    train: Train, single: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("run", max_train_steps=1, **single)
    monkeypatch.chdir(tmp_path)
    code = loading_code(read_run(run)).replace("path/to/community.safetensors", single["pretrained_model_name_or_path"])
    code = code.replace("path/to/settings", single["base_config"])
    space: dict[str, object] = {}
    exec(code.replace("pipe(prompt=", "pipe(num_inference_steps=1, prompt="), space)
    assert space["image"].size == (64, 64)  # type: ignore[attr-defined]
    assert torch.equal(space["pipe"].unet.conv_in.weight, load_run(run).unet.conv_in.weight)  # type: ignore[attr-defined]


def test_resuming_on_another_file_is_told(
    train: Train, single: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train("run", max_train_steps=1, **single)
    other = write(original(tiny_pipeline(seed=1)), tmp_path / "other.safetensors")
    train("run", max_train_steps=2, resume="latest", **single | {"pretrained_model_name_or_path": str(other)})
    assert "resuming with another base: the file is not what it was" in caplog.text


def test_the_memory_of_a_step_is_told_without_the_weights(
    settings: Callable[..., DreamBoothConfig], single: dict[str, str]
) -> None:
    of_file, of_folder = (describe_base(settings(**changes).section(BaseSection), "no") for changes in (single, {}))
    parameters = [sum(p.numel() for p in family.denoiser.parameters()) for family in (of_file, of_folder)]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_config": None}, r"is a single file, which has no settings: add --base_config FOLDER.*hf download"),
        ({"base_config": "nowhere"}, r"base_config nowhere is no diffusers folder here"),
        ({"variant": "fp16"}, r"revision and variant are for folders and the Hub"),
        ({"pretrained_model_name_or_path": "gone.safetensors"}, r"there is no file gone.safetensors"),
    ],
)
def test_what_cannot_be_a_base_says_what_to_do(
    changes: dict[str, str | None], said: str, train: Train, single: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match=said):
        train("run", **single | changes)
    assert not (tmp_path / "run").exists()


def test_settings_of_a_file_are_refused_for_a_folder(train: Train, base_folder: Path) -> None:
    with pytest.raises(BaseModelError, match="base_config is for a base in a single file"):
        train("run", base_config=str(base_folder))


def test_an_evaluation_loads_the_base_of_the_run(train: Train, single: dict[str, str], base_folder: Path) -> None:
    source = read_run(train("run", max_train_steps=1, **single)).source
    pipe = load_pipeline(source)
    folder = DiffusionPipeline.from_pretrained(base_folder, safety_checker=None, requires_safety_checker=False)
    assert same_tensors(pipe.unet.state_dict(), folder.unet.state_dict())
    assert own_guidance(source) == 7.5
