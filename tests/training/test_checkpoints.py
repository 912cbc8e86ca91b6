"""Checkpoints on disk: what is in them, which of them count, and how they are named and removed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from training.helpers import draw, samples, trained

import ether_diffusion as ether
from ether_diffusion.files import write_text
from ether_diffusion.runs.folder import find_checkpoint, list_checkpoints, remove_checkpoints

Train = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with three finished checkpoints, one past the padding, and things that are none."""
    for name in ("step-1000000", "step-000200", "step-999999", ".step-000300.tmp", "step-000200-copy", "best"):
        write_text(tmp_path / "checkpoints" / name / "trained.safetensors", name)
    write_text(tmp_path / "checkpoints" / "step-000400", "a file")
    return tmp_path


def test_checkpoints_are_listed_by_step_without_what_is_none(run: Path) -> None:
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["step-000200", "step-999999", "step-1000000"]


@pytest.mark.parametrize("wanted", ["step-000200", "200", "{run}/checkpoints/step-000200"])
def test_a_checkpoint_is_found_by_name_number_or_path(wanted: str, run: Path) -> None:
    assert find_checkpoint(run, wanted.format(run=run)) == run / "checkpoints" / "step-000200"


def test_latest_is_the_one_of_most_steps(run: Path) -> None:
    assert find_checkpoint(run, "latest").name == "step-1000000"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("step-000400", "it has: step-000200, step-999999, step-1000000; or pass --resume latest"),
        ("newest", "holds no checkpoint 'newest'"),
    ],
)
def test_an_unknown_one_is_answered_with_those_there_are(wanted: str, message: str, run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        find_checkpoint(run, wanted)


def test_a_removal_cut_short_leaves_nothing_that_looks_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*places: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("ether_diffusion.runs.folder.remove_own", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoints([run / "checkpoints" / "step-000200"])
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-999999", "step-1000000"]
    monkeypatch.undo()
    remove_checkpoints([run / "checkpoints" / "step-999999"])
    assert not (run / "checkpoints" / "step-999999").exists()


def test_of_a_removed_checkpoint_the_files_of_others_stay_and_are_no_checkpoint(run: Path) -> None:
    path = run / "checkpoints" / "step-999999"
    write_text(path / "notes.txt", "mine")
    remove_checkpoints([path])
    assert [file.name for file in path.iterdir()] == ["notes.txt"]
    assert [found.name for found in list_checkpoints(run / "checkpoints")] == ["step-000200", "step-1000000"]
    assert not list((run / "checkpoints").glob(".step-999999*"))


def test_a_checkpoint_that_is_a_link_is_removed_and_what_it_leads_to_is_not(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "trained.safetensors"
    write_text(elsewhere, "moved to another disk")
    (run / "checkpoints" / "step-000500").symlink_to(elsewhere.parent)
    assert "step-000500" in [found.name for found in list_checkpoints(run / "checkpoints")]
    remove_checkpoints([run / "checkpoints" / "step-000500"])
    assert not (run / "checkpoints" / "step-000500").exists()
    assert elsewhere.read_text() == "moved to another disk"


def test_a_checkpoint_holds_what_is_trained_and_not_the_base(train: Train, base_folder: Path) -> None:
    run = train(max_train_steps=1)
    keys = set(trained(run, 1))
    ether.load(pipe := DiffusionPipeline.from_pretrained(base_folder), run)
    vectors = ether.adapters(pipe)["default"].num_parameters
    assert sum(value.numel() for value in trained(run, 1).values()) == vectors
    assert {key.rpartition(".")[2] for key in keys} == {"u", "v", "u_out", "v_out"}
    assert not list((run / "checkpoints").rglob("model*.safetensors"))
    assert not list((run / "checkpoints").rglob("*.bin.index.json"))


def test_every_checkpoint_of_an_adapter_loads_into_a_pipeline(train: Train, base_folder: Path) -> None:
    every_step = {"checkpointing_steps": 1, "validation_steps": 1, "num_validation_images": 1}
    run = train(max_train_steps=2, learning_rate=0.02, resolution=64, **every_step)
    for step in (1, 2):
        pipe = DiffusionPipeline.from_pretrained(base_folder)
        ether.load(pipe, run / "checkpoints" / f"step-{step:06d}")
        assert np.array_equal(draw(pipe), samples(run)[f"step-{step:06d}/00.png"])
