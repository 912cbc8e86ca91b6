"""Several subjects in one run: each gets what training it alone would have given it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from training.helpers import draw_photo, metrics, provenance, relative_change, same_tensors, samples

import ether_diffusion as ether
import ether_diffusion.training.loop as loop
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.runs.lock import FolderInUseError, held
from ether_diffusion.training import dreambooth
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.loop import TrainingDivergedError
from ether_diffusion.training.subjects import subjects_of

Train = Callable[..., Path]
NAMES = ("black_dog", "cat", "teapot")
PROMPT = "a photo of qwe {subject}"


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of one to three photos; one with its own prompt."""
    folder = tmp_path_factory.mktemp("subjects")
    for number, name in enumerate(NAMES):
        for shade in range(number + 1):
            draw_photo(folder / name / f"{shade}.png", 3 * number + shade, (64 + 16 * number, 64))
    (folder / "teapot" / "prompt.txt").write_text("a qwe teapot\n")
    return folder


@pytest.fixture
def together(train: Train, subjects: Path) -> Train:
    """One run of all subjects; with small steps and a large ε, which keep Adam from blowing up roundings."""

    def run(name: str = "all", **changes: Any) -> Path:
        folders = {"instance_data_dir": Path(), "subjects_dir": subjects, "instance_prompt": PROMPT}
        return train(name, **folders | {"adam_epsilon": 1e-3, "learning_rate": 1e-2} | changes)

    return run


@pytest.fixture
def alone(train: Train, subjects: Path) -> Train:
    """A run of one subject."""

    def run(name: str, **changes: Any) -> Path:
        prompt = "a qwe teapot" if name == "teapot" else PROMPT.format(subject=name.replace("_", " "))
        values = {"instance_data_dir": subjects / name, "instance_prompt": prompt}
        return train(f"alone-{name}", **values | {"adam_epsilon": 1e-3, "learning_rate": 1e-2} | changes)

    return run


CASES: dict[str, dict[str, Any]] = {
    "ETHER+": {"method": "ether_plus"},
    "ETHER": {"method": "ether"},
    "short": {"method": "ether_plus_free", "initial_length": 0.5},
    "prior and accumulation": {
        "method": "ether_plus",
        "with_prior_preservation": True,
        "num_class_images": 2,
        "gradient_accumulation_steps": 2,
        "random_flip": True,
    },
    "average": {"method": "ether_plus", "ema_decay": 0.9},
    "text encoder": {"method": "ether_plus", "train_text_encoder": True, "train_batch_size": 2},
    "gradient checkpointing": {"method": "ether_plus", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_every_subject_is_what_training_it_alone_gives(case: str, together: Train, alone: Train) -> None:
    settings = CASES[case]
    prior = settings.get("with_prior_preservation", False)
    run = together(**settings, **({"class_prompt": "a photo of a {subject}"} if prior else {}))
    for name in NAMES:
        class_prompt = {"class_prompt": f"a photo of a {name.replace('_', ' ')}"} if prior else {}
        single = alone(name, **settings, **class_prompt)
        trained, expected = (load_file(folder / "ether_weights.safetensors") for folder in (run / name, single))
        assert relative_change(trained, expected) < 1e-5
        for row, other in zip(metrics(run / name), metrics(single), strict=True):
            assert row.keys() == other.keys()
            for key in row.keys() - {"lr", "step"}:
                assert row[key] == pytest.approx(other[key], rel=1e-4), key
            assert row["lr"] == other["lr"]
    first, second = (load_file(run / name / "ether_weights.safetensors") for name in NAMES[:2])
    assert relative_change(first, second) > 1e-3


def test_the_gradient_of_each_subject_is_clipped_by_itself(together: Train, alone: Train) -> None:
    run = together(max_grad_norm=1e-3, method="ether_plus")
    single = alone("cat", max_grad_norm=1e-3, method="ether_plus")
    trained, expected = (load_file(folder / "ether_weights.safetensors") for folder in (run / "cat", single))
    assert relative_change(trained, expected) < 1e-5


def test_every_subject_has_a_run_folder_of_its_own(together: Train, alone: Train) -> None:
    run = together(num_validation_images=1, resolution=64)
    for name in NAMES:
        folder = run / name
        for file in ("ether_weights.safetensors", "report.html", "README.md", "metrics.jsonl", "provenance.json"):
            assert (folder / file).is_file(), file
        assert provenance(folder)["status"] == "finished"
        assert provenance(folder)["step"] == 3
        pipe = tiny_pipeline()
        ether.load(pipe, folder, name=name)
        assert ether.adapters(pipe)[name].num_parameters == provenance(folder)["trained_parameters"]["unet"]
    single = alone("cat", num_validation_images=1, resolution=64)
    settings, expected = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run / "cat", single))
    placed = ("output_dir", "cache_dir")
    assert {k: v for k, v in settings.items() if k not in placed} == {
        k: v for k, v in expected.items() if k not in placed
    }
    drawn, wanted = samples(run / "cat"), samples(single)
    assert np.array_equal(drawn["step-000000/00.png"], wanted["step-000000/00.png"])
    difference = drawn["step-000003/00.png"].astype(int) - wanted["step-000003/00.png"].astype(int)
    assert abs(difference).max() <= 2
    assert provenance(run)["subjects"] == list(NAMES)
    assert provenance(run)["status"] == "finished"


def test_a_resumed_run_is_the_uninterrupted_one(together: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"max_train_steps": 4, "checkpointing_steps": 2, "num_validation_images": 1, "validation_steps": 2}
    whole = together("whole", **common)

    class Unplugged(BaseException):
        pass

    original = loop._Run.sample_if_due

    def unplug(run: Any, step: int, interrupts: Any) -> None:
        original(run, step, interrupts)
        if step == 3:
            raise Unplugged

    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "sample_if_due", unplug)
        with pytest.raises(Unplugged):
            together("cut", **common)
    cut = together("cut", resume="latest", **common)
    for name in NAMES:
        assert metrics(whole / name) == metrics(cut / name)
        assert same_tensors(samples(whole / name), samples(cut / name))
        left, right = (load_file(run / name / "ether_weights.safetensors") for run in (whole, cut))
        assert same_tensors(left, right)
    saved = load_file(cut / "checkpoints" / "step-000004" / "trained.safetensors")
    assert {key.split(".")[0] for key in saved} == set(NAMES)
    ether.load(tiny_pipeline(), cut / "checkpoints" / "step-000004" / "cat")


def test_a_loss_that_is_not_finite_names_its_subject(
    together: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = dreambooth.DenoisingModel.forward

    def broken(model: Any, lanes: Any) -> Any:
        losses = original(model, lanes)
        losses[1]["loss"] = losses[1]["loss"] * float("nan")
        return losses

    monkeypatch.setattr(dreambooth.DenoisingModel, "forward", broken)
    with pytest.raises(TrainingDivergedError, match="the loss of cat is not finite at step 1"):
        together()
    assert provenance(tmp_path / "all")["status"] == provenance(tmp_path / "all" / "cat")["status"] == "failed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_data_dir": "dog"}, "either instance_data_dir, for one subject, or subjects_dir"),
        ({"method": "lora"}, "subjects_dir trains ether, ether_plus, anchored, ether_plus_free"),
        ({"aspect_ratio_buckets": True}, "leave out aspect_ratio_buckets"),
        ({"mixed_precision": "fp16"}, "subjects_dir needs bf16 or no"),
        ({"optimizer": "prodigy"}, "subjects_dir cannot use prodigy"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str, subjects: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"subjects_dir": subjects, "instance_prompt": PROMPT, "output_dir": tmp_path}
    with pytest.raises(ValueError, match=message):
        DreamBoothConfig("base", **values | changes)


@pytest.mark.parametrize(
    ("name", "message"), [(None, "holds no folders"), ("a.b", "cannot have a dot: a.b"), ("samples", "called samples")]
)
def test_folders_that_do_not_do(name: str | None, message: str, together: Train, tmp_path: Path) -> None:
    (tmp_path / "folders").mkdir()
    if name is not None:
        draw_photo(tmp_path / "folders" / name / "0.png")
    with pytest.raises(ValueError, match=message):
        together(subjects_dir=tmp_path / "folders")


def test_each_subject_is_uploaded_to_a_repository_of_its_own(subjects: Path, tmp_path: Path) -> None:
    config = DreamBoothConfig(
        "base", tmp_path, subjects_dir=subjects, instance_prompt=PROMPT, hub_model_id="me/x", push_to_hub=True
    )
    assert [each.hub_model_id for each in subjects_of(config).values()] == [f"me/x-{name}" for name in NAMES]


def test_each_subject_has_a_lora_of_its_own(together: Train, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    together(export_lora="diffusers")
    written = {(tmp_path / "all" / name / "pytorch_lora_weights.safetensors").read_bytes() for name in NAMES}
    assert len(written) == len(NAMES)


def test_each_subjects_folder_is_held(together: Train, tmp_path: Path) -> None:
    with held(tmp_path / "all" / "cat"), pytest.raises(FolderInUseError, match=r"all/cat is held by process \d+"):
        together()
    assert not (tmp_path / "all").exists()
    together()
    assert not list((tmp_path / "all").rglob(".lock"))
    assert not list((tmp_path / "all").rglob(".running.json"))


def test_a_run_that_is_there_is_not_overwritten(together: Train, tmp_path: Path) -> None:
    together()
    before = json.loads((tmp_path / "all" / "cat" / "provenance.json").read_text())
    with pytest.raises(FileExistsError):
        together()
    assert json.loads((tmp_path / "all" / "cat" / "provenance.json").read_text()) == before
    together(overwrite=True)
