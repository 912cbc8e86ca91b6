"""One run holds a folder at a time, whatever became of the last one."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training.helpers import provenance

from ether_diffusion.runs.lock import HOLDER, LOCK, FolderInUseError, held

Train = Callable[..., Path]

SHORT: dict[str, Any] = {"max_train_steps": 1, "resolution": 16}
HOLD = """
import sys, time
from pathlib import Path
from ether_diffusion.runs.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder ``run``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_start_names_the_process_and_the_machine(
    other: subprocess.Popen[str], train: Train, tmp_path: Path
) -> None:
    before = sorted((tmp_path / "run").iterdir())
    said = re.escape(f"held by process {other.pid} on {socket.gethostname()}")
    for changes in ({}, {"overwrite": True}, {"resume": "latest"}):
        with pytest.raises(FolderInUseError, match=said):
            train(**SHORT, **changes)
    assert sorted((tmp_path / "run").iterdir()) == before


def test_the_lock_of_a_dead_process_is_taken_over(other: subprocess.Popen[str], train: Train, tmp_path: Path) -> None:
    other.kill()
    other.wait()
    assert json.loads((tmp_path / "run" / HOLDER).read_text())["pid"] == other.pid
    run = train(**SHORT)
    assert provenance(run)["status"] == "finished"
    assert not {HOLDER, LOCK} & {path.name for path in run.iterdir()}


def test_the_lock_of_another_machine_is_named_and_refused(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / HOLDER).write_text(json.dumps({"pid": 7, "host": "node-7"}))
    with pytest.raises(FolderInUseError, match="held by process 7 on node-7, another machine"):
        train(**SHORT)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [HOLDER]


def test_a_start_that_fails_leaves_no_folder_and_holds_none(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), held(tmp_path / "new" / "run"):
            raise KeyError
    assert not (tmp_path / "new").exists()


def test_processes_that_do_not_know_of_each_other_are_refused(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """As plain torchrun starts them on CPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for variable in ("ACCELERATE_USE_CPU", "MASTER_ADDR"):
        monkeypatch.delenv(variable, raising=False)
    assert "LOCAL_RANK" not in os.environ
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but Accelerate trains in 1 process"):
        train(**SHORT)


@pytest.mark.parametrize(
    ("variable", "name"),
    [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")],
)
def test_what_shards_the_model_is_refused_by_name(
    variable: str, name: str, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        train(**SHORT)
    assert not (tmp_path / "run").exists()
