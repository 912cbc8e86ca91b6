"""A resumed run is the uninterrupted run: weights, optimiser, schedule, metrics and samples, bit for bit."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training.helpers import (
    checkpoints,
    draw_photo,
    metrics,
    optimizer_state,
    provenance,
    relative_change,
    same_tensors,
    samples,
    schedule_state,
    trained,
)

import ether_diffusion.training.loop as loop
from ether_diffusion.files import write_text
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.runs.checksums import damage
from ether_diffusion.runs.folder import find_checkpoint
from ether_diffusion.training.samples import Sampler

Train = Callable[..., Path]


class Unplugged(BaseException):
    """Stands for a power cut: nothing catches it."""


@pytest.fixture
def unplug(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``unplug(4)``: the next run ends without a word when step 4 has been logged, saved and sampled."""

    def at(last_step: int) -> None:
        original = loop._Run.sample_if_due

        def sample_if_due(run: Any, step: int, interrupts: Any) -> None:
            original(run, step, interrupts)
            if step == last_step:
                monkeypatch.setattr(loop._Run, "sample_if_due", original)
                raise Unplugged

        monkeypatch.setattr(loop._Run, "sample_if_due", sample_if_due)

    return at


def assert_same_run(left: Path, right: Path, step: int) -> None:
    assert metrics(left) == metrics(right)
    assert same_tensors(trained(left, step), trained(right, step))
    assert same_tensors(optimizer_state(left, step), optimizer_state(right, step))
    assert same_tensors(schedule_state(left, step), schedule_state(right, step))
    assert same_tensors(samples(left), samples(right))
    assert checkpoints(left) == checkpoints(right)


HARD: dict[str, Any] = {
    "train_text_encoder": True,
    "with_prior_preservation": True,
    "class_prompt": "a photo of a dog",
    "num_class_images": 3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "gradient_accumulation_steps": 2,
    "random_flip": True,
    "noise_offset": 0.1,
    "snr_gamma": 5.0,
}


WARM_UP: dict[str, Any] = {"lr_scheduler": "piecewise_constant", "lr_step_rules": "0:2,1"}

SHORT: dict[str, Any] = {"method": "ether_plus_free", "initial_length": 0.5, "train_text_encoder": True}

CASES: dict[str, tuple[int, str | None, dict[str, Any]]] = {
    "free vectors that begin short": (3, None, SHORT),
    "at a checkpoint": (4, None, {}),
    "between checkpoints": (3, None, {}),
    "everything on": (4, None, HARD),
    "buckets": (4, None, {"aspect_ratio_buckets": True, "train_batch_size": 2}),
    "full": (4, None, {"method": "full", "mixed_precision": "bf16"}),
    "prodigy": (4, "prodigyopt", {"optimizer": "prodigy"}),
    "LoRA still zero": (2, "peft", {"method": "lora", **WARM_UP}),
    "OFT still zero": (2, "peft", {"method": "oft", **WARM_UP}),
}
"""The step after which the run dies, a package it needs, and its settings."""


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(
    case: str, train: Train, unplug: Callable[[int], None], wide_photos: Path
) -> None:
    stop, package, changes = CASES[case]
    if package is not None:
        pytest.importorskip(package)
    common: dict[str, Any] = {
        "instance_data_dir": wide_photos,
        "max_train_steps": 6,
        "checkpointing_steps": 2,
        "validation_steps": 3,
        "num_validation_images": 1,
        "resolution": 32,
    }
    whole = train("whole", **common | changes)
    unplug(stop)
    with pytest.raises(Unplugged):
        train("parts", **common | changes)
    assert len(metrics(whole)) == 6
    assert provenance(whole)["status"] == "finished"
    parts = train("parts", resume="latest", **common | changes)
    assert_same_run(parts, whole, 6)
    assert provenance(parts)["status"] == "finished"


def test_a_run_of_the_unfused_optimizer_goes_on_with_it(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of 0.1 are of that one: resumed by this version, they are the run that 0.1 would have made."""
    with monkeypatch.context() as old:
        old.setattr("ether_diffusion.training.optimizers.FUSED_ON", ())
        whole = train("whole", max_train_steps=4, checkpointing_steps=2)
        train("parts", max_train_steps=2, checkpointing_steps=2)
    parts = train("parts", max_train_steps=4, checkpointing_steps=2, resume="latest")
    assert [group["fused"] for group in optimizer_state(parts, 4)["param_groups"]] == [None]
    assert_same_run(parts, whole, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_on_a_gpu_follows_the_uninterrupted_one(
    precision: str, train: Train, unplug: Callable[[int], None]
) -> None:
    """Not bit for bit: kernels of a GPU may add up in any order."""
    common: dict[str, Any] = {"max_train_steps": 6, "checkpointing_steps": 2, "mixed_precision": precision}
    whole = train("whole", **common)
    unplug(3)
    with pytest.raises(Unplugged):
        train("parts", **common)
    parts = train("parts", resume="latest", **common)
    assert provenance(parts)["status"] == "finished"
    start = train("start", **common | {"max_train_steps": 1, "learning_rate": 1e-12})
    assert relative_change(trained(parts, 6), trained(whole, 6)) < 1e-2 * relative_change(
        trained(start, 1), trained(whole, 6)
    )


def test_resuming_a_named_checkpoint_forgets_what_came_after_it(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise "latest" would later find the abandoned steps, and the grid would show them."""
    common: dict[str, Any] = {"checkpointing_steps": 2, "validation_steps": 2, "num_validation_images": 1}
    run = train(max_train_steps=6, **common)
    with caplog.at_level(logging.WARNING):
        train(max_train_steps=4, resume="step-000002", learning_rate=1e-3, **common)
    assert "going on from step 2: step-000004, step-000006 are removed" in caplog.text
    assert "learning_rate: 0.006 → 0.001" in caplog.text
    assert checkpoints(run) == ["step-000002", "step-000004"]
    assert sorted({name.partition("/")[0] for name in samples(run)}) == ["step-000000", "step-000002", "step-000004"]
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    straight = train("straight", max_train_steps=2, **common)
    assert same_tensors(trained(run, 2), trained(straight, 2))


def test_resuming_an_earlier_checkpoint_leaves_the_files_of_others(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    common: dict[str, Any] = {"checkpointing_steps": 2, "validation_steps": 2, "num_validation_images": 1}
    run = train(max_train_steps=6, **common)
    mine = [
        *(run / "samples" / f"step-{step:06d}" / "best.txt" for step in (4, 6)),
        *(run / "checkpoints" / f"step-{step:06d}" / "notes.txt" for step in (4, 6)),
    ]
    for path in mine:
        path.write_text(str(path))
    old = samples(run)
    with caplog.at_level(logging.WARNING):
        train(max_train_steps=4, resume="step-000002", **common)
    assert [path.read_text() for path in mine] == list(map(str, mine))
    for folder in {path.parent for path in mine}:
        assert f"{folder} holds files that the run did not write: they stay" in caplog.text
    drawn = samples(run)
    assert [name for name in old if name in drawn] == [name for name in old if "step-000006" not in name]
    assert all(np.array_equal(drawn[name], old[name]) for name in drawn)  # drawn anew beside what stays
    assert find_checkpoint(run, "latest").name == "step-000004"
    assert damage(find_checkpoint(run, "latest")) == []
    train(max_train_steps=6, resume="latest", **common)
    assert same_tensors(samples(run), old)
    assert [path.read_text() for path in mine] == list(map(str, mine))


def test_a_finished_run_goes_on_to_more_steps(train: Train) -> None:
    run = train(max_train_steps=2)
    train(max_train_steps=4, resume="latest")
    longer = train("longer", max_train_steps=4)
    assert metrics(run) == metrics(longer)
    assert same_tensors(trained(run, 4), trained(longer, 4))


def test_only_the_newest_checkpoints_are_kept(train: Train) -> None:
    run = train(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    assert checkpoints(run) == ["step-000004", "step-000005"]


def test_what_a_killed_process_left_half_written_is_removed(train: Train) -> None:
    run = train(max_train_steps=2)
    write_text(run / "checkpoints" / ".step-000001.tmp" / "model.bin", "half")
    train(max_train_steps=3, resume="latest")
    assert checkpoints(run) == ["step-000002", "step-000003"]


def test_a_torn_last_line_of_the_metrics_is_dropped(train: Train) -> None:
    run = train(max_train_steps=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    train(max_train_steps=3, resume="latest")
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]


def test_class_images_are_the_same_after_an_interruption(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is drawn within the same batches, for on some machines the last bit depends on the batch."""
    drawn_together: list[list[int]] = []
    original = Sampler.images

    def images(self: Sampler, prompts: list[str], seeds: list[int]) -> Any:
        drawn_together.append(list(seeds))
        return original(self, prompts, seeds)

    monkeypatch.setattr(Sampler, "images", images)
    common: dict[str, Any] = {
        "with_prior_preservation": True,
        "class_prompt": "a photo of a dog",
        "num_class_images": 5,
        "sample_batch_size": 3,
        "max_train_steps": 1,
    }
    folder = train(**common) / "class_images"
    drawn = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert sorted(drawn) == [f"class-{index:06d}.png" for index in range(5)]
    assert len(set(drawn.values())) == 5
    assert drawn_together == [[0, 1, 2], [3, 4]]
    (folder / "class-000004.png").unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    train(overwrite=True, **common)
    assert drawn_together[2:] == [[3, 4]]
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == drawn
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_own_class_images_are_used_and_only_the_rest_is_drawn(train: Train, tmp_path: Path) -> None:
    for shade in range(2):
        draw_photo(tmp_path / "class" / f"own-{shade}.png", shade)
    run = train(
        with_prior_preservation=True,
        class_prompt="a photo of a dog",
        class_data_dir=tmp_path / "class",
        num_class_images=3,
        max_train_steps=1,
    )
    assert sorted(path.name for path in (tmp_path / "class").glob("*.png")) == [
        "class-000000.png",
        "own-0.png",
        "own-1.png",
    ]
    assert provenance(run)["class_images"] == 3
    assert not (run / "class_images").exists()


@pytest.mark.parametrize(("setting", "value"), [("class_prompt", "a photo of a cat"), ("num_inference_steps", 3)])
def test_class_images_of_other_settings_are_not_taken_for_these(setting: str, value: Any, train: Train) -> None:
    common: dict[str, Any] = {"with_prior_preservation": True, "num_class_images": 1, "max_train_steps": 1}
    first = {"class_prompt": "a photo of a dog", "num_inference_steps": 2}
    folder = train(**common, **first) / "class_images"
    with pytest.raises(
        ValueError, match=rf"generated otherwise \({setting.removeprefix('class_')}: .* → {value}\)"
    ) as error:
        train("again", class_data_dir=folder, **common, **first | {setting: value})
    assert str(folder) in str(error.value)
    train("same", class_data_dir=folder, **common, **first)


def test_resuming_on_another_base_is_noticed(
    train: Train, base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    train(pretrained_model_name_or_path=str(base), max_train_steps=2)
    shutil.rmtree(base)
    tiny_pipeline(seed=1).save_pretrained(base)
    with caplog.at_level(logging.WARNING):
        train(pretrained_model_name_or_path=str(base), max_train_steps=3, resume="latest")
    assert "resuming with another setting, base_hash: {'unet': " in caplog.text
