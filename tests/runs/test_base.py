"""A run's base is loaded again as it was trained on: of its revision and its variant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from training.helpers import QUIET, draw_photo

from ether_diffusion.cli.programs import weights
from ether_diffusion.evaluation.controls.settings import ControlStudyConfig
from ether_diffusion.evaluation.controls.study import ControlStudy, all_jobs
from ether_diffusion.evaluation.paper import energy, perturbation
from ether_diffusion.evaluation.subjects.benchmark import Bench
from ether_diffusion.evaluation.subjects.settings import BenchmarkConfig
from ether_diffusion.pipelines.fingerprint import base_hash
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.private import forget_accelerator
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.drawing import load_pipeline, load_run
from ether_diffusion.runs.model_card import loading_code
from ether_diffusion.runs.record import read_run
from ether_diffusion.training import dreambooth
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

HUB = "owner/base"
Train = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub whose one model has another main branch than its tag v1."""
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "main")
    folders = {None: tmp_path / "main", "main": tmp_path / "main", "v1": base_folder}
    for name in ("from_pretrained", "load_config"):
        original = getattr(DiffusionPipeline, name).__func__

        def fetch(cls: Any, source: Any, original: Any = original, **settings: Any) -> Any:
            revision = settings.pop("revision", None)
            return original(cls, str(folders[revision]) if source == HUB else source, **settings)

        monkeypatch.setattr(DiffusionPipeline, name, classmethod(fetch))


@pytest.fixture
def train(tmp_path: Path) -> Train:
    draw_photo(tmp_path / "photos" / "0.png")

    def run(**changes: Any) -> Path:
        forget_accelerator()
        folder = tmp_path / "run"
        dreambooth.run(
            DreamBoothConfig(**QUIET | {"output_dir": folder, "instance_data_dir": tmp_path / "photos"} | changes)
        )
        return folder

    return run


def same_base(pipe: DiffusionPipeline, seed: int) -> bool:
    return base_hash(pipe.unet) == base_hash(tiny_pipeline(seed=seed).unet)


@pytest.mark.parametrize("method", ["ether", "lora"])
@pytest.mark.usefixtures("hub")
def test_a_run_is_loaded_on_the_revision_that_it_was_trained_on(method: str, train: Train) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    run = train(pretrained_model_name_or_path=HUB, revision="v1", method=method)
    pipe = load_run(run)
    if method == "lora":
        pipe.unload_lora_weights()
    assert same_base(pipe, 0)
    assert not same_base(load_pipeline(Base(HUB)), 0)
    assert f'from_pretrained("{HUB}", revision="v1")' in loading_code(read_run(run))
    assert read_run(run).settings()["revision"] == "v1"
    changed = energy.study([run])["run"]
    assert changed["base"] == f"{HUB} (revision v1)"
    assert abs(changed["all"]) < 0.1  # three steps; against the main branch it is all the difference of two models


def test_a_run_is_loaded_with_the_variant_that_it_was_trained_on(train: Train, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "half", variant="fp16")
    run = train(pretrained_model_name_or_path=str(tmp_path / "half"), variant="fp16", method="ether")
    assert same_base(load_run(run), 0)
    assert 'variant="fp16"' in loading_code(read_run(run))


@pytest.mark.usefixtures("hub")
def test_a_benchmark_compares_with_the_revision_of_its_training(tmp_path: Path) -> None:
    for version, seed in ({"revision": "v1"}, 0), ({}, 1):
        config = BenchmarkConfig(tmp_path / "bench", training={"pretrained_model_name_or_path": HUB, **version})
        bench = Bench(config, [], None, torch.device("cpu"))  # type: ignore[arg-type]
        assert bench.base_hashes["unet"] == base_hash(tiny_pipeline(seed=seed).unet)


@pytest.mark.usefixtures("hub")
def test_a_study_of_controls_knows_the_revision_of_each_arm(tmp_path: Path) -> None:
    training = {"pretrained_model_name_or_path": HUB, "train_data_dir": "playground"}
    config = ControlStudyConfig(tmp_path, {"a": {"revision": "v1"}, "b": {}}, training)
    study = ControlStudy(config, torch.device("cpu"))
    hashes = [study.base_of(job)["unet"] for job in all_jobs(config)]
    assert hashes == [base_hash(tiny_pipeline(seed=seed).unet) for seed in (0, 1)]


@pytest.mark.usefixtures("hub")
def test_the_perturbation_takes_revision_and_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Base] = []

    class EnoughError(ValueError):
        pass

    def load(base: Base, device: object) -> None:
        loaded.append(base)
        raise EnoughError("enough")

    monkeypatch.setattr(perturbation, "load_pipeline", load)
    flags = ["--base", HUB, "--revision", "v1", "--variant", "fp16", "--dino", "playground", "--clip", "playground"]
    with pytest.raises(SystemExit):
        weights.perturbation([*flags, "--prompts", "a dog", "--output_dir", str(tmp_path)])
    assert loaded == [Base(HUB, "v1", "fp16")]
    assert json.dumps(loaded[0].version) == '{"revision": "v1", "variant": "fp16"}'


def test_a_safety_checker_that_training_leaves_out_is_not_loaded_to_draw(base_folder: Path, tmp_path: Path) -> None:
    """Its weights need not even be there, as for training."""
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_pipeline(Base(str(folder))).safety_checker is None
