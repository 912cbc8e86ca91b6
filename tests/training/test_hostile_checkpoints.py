"""A checkpoint of a stranger executes nothing, and a refused resume leaves the run as it was."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training.helpers import optimizer_state, provenance, same_tensors, schedule_state, trained

from ether_diffusion.runs.checksums import write_checksums
from ether_diffusion.training.saved_state import read_saved

Train = Callable[..., Path]

PICKLED = ["optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"]
COMMON: dict[str, Any] = {"resolution": 16, "checkpointing_steps": 1}


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of this module is kept, from which each test takes a copy."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(finished: Path, train: Train, tmp_path: Path) -> Path:
    """A finished run of two steps."""
    if not finished.exists():
        shutil.copytree(train(max_train_steps=2, **COMMON), finished)
        shutil.rmtree(tmp_path / "run")
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", PICKLED)
@pytest.mark.parametrize("how", ["a raw pickle", "torch.save", "torch.save of old"])
def test_resuming_executes_nothing_and_changes_nothing(
    name: str, how: str, run: Path, train: Train, tmp_path: Path
) -> None:
    path, attack = run / "checkpoints" / "step-000002" / name, Attack(tmp_path / "executed")
    if how == "a raw pickle":
        path.write_bytes(pickle.dumps(attack))
    else:
        torch.save({"step": attack}, path, _use_new_zipfile_serialization=how == "torch.save")
    write_checksums(path.parent)  # as an attacker would
    before = content(run)
    with pytest.raises(ValueError, match=rf"{name} is refused"):
        train(resume="latest", max_train_steps=3, **COMMON)
    assert not (tmp_path / "executed").exists()
    assert content(run) == before


def test_the_attack_of_these_tests_works_where_files_are_unpickled(tmp_path: Path) -> None:
    torch.save(Attack(tmp_path / "executed"), tmp_path / "file")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file", weights_only=True)
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("name", [*PICKLED[:2], "trained.safetensors"])
def test_a_missing_file_of_a_checkpoint_is_named(name: str, run: Path, train: Train) -> None:
    (run / "checkpoints" / "step-000002" / name).unlink()
    write_checksums(run / "checkpoints" / "step-000002")
    before = content(run)
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        train(resume="latest", max_train_steps=3, **COMMON)
    assert content(run) == before


@pytest.mark.parametrize("changes", [{"method": "ether"}, {"n_blocks": 2}, {"targets": "cross_attention"}])
def test_a_refused_resume_leaves_the_record_of_the_finished_run(
    changes: dict[str, Any], run: Path, train: Train
) -> None:
    (run / "checkpoints" / ".step-000001.tmp").mkdir()
    before = content(run)
    with pytest.raises(ValueError, match="does not fit this run's method or targets"):
        train(resume="latest", max_train_steps=3, **COMMON | changes)
    assert content(run) == before
    assert (run / "checkpoints" / ".step-000001.tmp").is_dir()
    assert provenance(run)["status"] == "finished"


def test_all_that_a_checkpoint_holds_is_read_without_unpickling(run: Path, train: Train) -> None:
    """The names and formats are those of 0.1, whose checkpoints go on."""
    for name in PICKLED:
        assert read_saved(run / "checkpoints" / "step-000002" / name)
    resumed = train(resume="latest", max_train_steps=3, **COMMON)
    whole = train("whole", max_train_steps=3, **COMMON)
    for read in (trained, optimizer_state, schedule_state):
        assert same_tensors(read(resumed, 3), read(whole, 3))
