"""The run folder: what stands beside a result, and who may write there."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from training.helpers import metrics, provenance

from ether_diffusion.pipelines.fingerprint import base_hash
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.reading import DamagedFileError
from ether_diffusion.runs.folder import (
    MetricsFile,
    Provenance,
    changed_settings,
    clear_run_folder,
    forget_after,
    open_run_folder,
    public_settings,
    read_provenance,
    write_config,
)
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

Train = Callable[..., Path]
Settings = Callable[..., DreamBoothConfig]


def test_provenance_says_what_the_result_depends_on(train: Train, settings: Settings, photos: Path) -> None:
    run = train(max_train_steps=2)
    said = provenance(run)
    pipe = tiny_pipeline()
    resolved = {"learning_rate": 6e-3, "mixed_precision": "no", "sampler": "DPMSolverMultistepScheduler"}
    assert said["config_hash"] == settings(max_train_steps=2, guidance_scale=7.5, **resolved).hash()
    assert said["base_hash"]["unet"] == base_hash(pipe.unet)
    assert said["base_hash"]["text_encoder"] == base_hash(pipe.text_encoder)
    assert said["versions"]["torch"] == torch.__version__
    assert said["versions"]["diffusers"] == version("diffusers")
    assert said["instance_images"] == [str(photos / f"{index}.png") for index in range(3)]
    assert (said["device"], said["num_processes"], said["status"], said["step"]) == ("cpu", 1, "finished", 2)


def test_a_resumed_run_keeps_its_start_and_adds_its_time(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(max_train_steps=1, resolution=16)
    first = provenance(run) | {"started": "2024-05-01T10:00:00+00:00", "seconds": 1000.0}
    (run / "provenance.json").write_text(json.dumps(first))
    clock = itertools.count(7)
    monkeypatch.setattr("ether_diffusion.training.loop.time.perf_counter", lambda: next(clock))
    train(max_train_steps=2, resume="latest", resolution=16)
    assert provenance(run)["started"] == "2024-05-01T10:00:00+00:00"
    assert 1000 < provenance(run)["seconds"] < 1100  # the clock went on by one each time that anybody looked


def test_opening_a_folder_leaves_nothing_behind(settings: Settings, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert open_run_folder(settings("new/folder").run) is None
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_with_a_run_is_refused_and_emptied_only_when_told(train: Train, settings: Settings) -> None:
    folder = train(max_train_steps=1, resolution=16)
    (folder / "notes.txt").write_text("")
    with pytest.raises(FileExistsError, match=r"already holds a run \(finished\): choose another"):
        open_run_folder(settings().run)
    open_run_folder(settings(overwrite=True).run)
    assert (folder / "ether_weights.safetensors").exists()
    clear_run_folder(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "notes.txt"]


def test_settings_that_differ_from_the_first_start_are_told(settings: Settings) -> None:
    settings().output_dir.mkdir()
    write_config(settings(seed=1, targets=["attn1.*"]).run)
    assert changed_settings(settings(seed=1, targets=["attn1.*"], resume="latest", overwrite=True).run, {}) == []
    changes = changed_settings(settings(seed=2, targets=["attn1.*"], resume="latest").run, {})
    assert changes == ["seed: 1 → 2"]


def test_metrics_drop_what_json_cannot_say_and_rows_after_the_start(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step, norm in enumerate((0.5, math.inf, 0.25), start=1):
        file.append({"step": step, "loss": 1.0, "grad_norm": norm})
    assert metrics(tmp_path)[1] == {"step": 2, "loss": 1.0}
    MetricsFile(tmp_path / "metrics.jsonl", 2).append({"step": 3, "loss": 9.0})
    assert [(row["step"], row["loss"]) for row in metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 9.0)]


def test_forgetting_keeps_the_steps_before(tmp_path: Path) -> None:
    for kind in ("samples", "checkpoints"):
        for step in (0, 2, 4):
            (tmp_path / kind / f"step-{step:06d}").mkdir(parents=True)
    forget_after(tmp_path, 2)
    for kind in ("samples", "checkpoints"):
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == ["step-000000", "step-000002"]


def test_provenance_is_whole_after_every_update(settings: Settings) -> None:
    settings().output_dir.mkdir()
    record = Provenance(settings().run, {"device": "cpu"})
    record.update(status="running", step=1)
    record.update(step=2)
    assert provenance(settings().output_dir) == record.content
    assert (record.content["status"], record.content["step"], record.content["device"]) == ("running", 2, "cpu")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it holds a list"),
        ('{"seconds": "long"}', "its seconds is 'long'"),
        ('{"pictures": {"a.png": 1}}', "its pictures is a dict"),
        ('{"step": 1e9}', "its step is 1000000000.0"),
        ('{"status": "a", "status": "b"}', "twice"),
    ],
)
def test_a_damaged_provenance_is_named(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "provenance.json"
    path.write_text(content)
    with pytest.raises(DamagedFileError, match=f"{path} is damaged.*{reason}.*; remove it, and the run can be resumed"):
        read_provenance(tmp_path)


def test_damaged_lines_of_the_metrics_are_counted_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": "x"}\n\xff\xfe\n[2]\n{"step": 2}\n{"ste')
    assert MetricsFile(path, 5).last_step == 2
    assert "3 lines are damaged and left out" in caplog.text
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_run_is_not_replaced_by_one_that_cannot_start(train: Train) -> None:
    run = train(max_train_steps=1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="n_blocks=7 does not divide"):
        train(max_train_steps=1, overwrite=True, n_blocks=7)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_judges_that_others_see_are_named_without_a_folder_of_this_machine(tmp_path: Path) -> None:
    judges = {"dino": str(tmp_path / "judges" / "dino"), "clip": "anytorch:ViT-L/14"}
    assert public_settings(judges) == {"dino": "dino", "clip": "anytorch:ViT-L/14"}
    hub = {"dino": "facebook/dino-vits16", "clip": f"anytorch:{tmp_path}/ViT-L-14.pt"}
    assert public_settings(hub) == {"dino": "facebook/dino-vits16", "clip": "anytorch:ViT-L-14.pt"}
