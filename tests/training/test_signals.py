"""Ctrl-C and SIGTERM save and leave; SIGKILL, at whatever moment, leaves the last good checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import before_file_calls, die
from training.helpers import (
    checkpoints,
    metrics,
    optimizer_state,
    provenance,
    same_tensors,
    samples,
    trained,
)

from ether_diffusion.runs.folder import list_checkpoints, step_of
from ether_diffusion.training.dreambooth import main
from ether_diffusion.training.interrupts import Interrupts
from ether_diffusion.training.samples import Sampler

Train = Callable[..., Path]
Flags = Callable[..., list[str]]


def assert_saved(run: Path, step: int) -> None:
    assert checkpoints(run)[-1] == f"step-{step:06d}"
    assert [row["step"] for row in metrics(run)] == list(range(1, step + 1))
    assert (provenance(run)["status"], provenance(run)["step"]) == ("interrupted", step)
    assert not (run / "ether_weights.safetensors").exists(), "it would look finished"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_program_with_a_checkpoint_and_no_traceback(
    number: signal.Signals,
    code: int,
    flags: Flags,
    train: Train,
    program: list[str],
    one_thread: dict[str, str],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    command = [*program, *flags(run, max_train_steps=10_000, resolution=16)]
    process = subprocess.Popen(command, env=one_thread, stderr=subprocess.PIPE, text=True)
    try:
        while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 2:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in said
    step = step_of(list_checkpoints(run / "checkpoints")[-1])
    assert f"stopped by {number.name} after step {step}, which is saved; --resume latest goes on from there" in said
    assert_saved(run, step)

    train(resume="latest", max_train_steps=step + 2, resolution=16)
    whole = train("whole", max_train_steps=step + 2, resolution=16)
    assert metrics(run) == metrics(whole)
    assert same_tensors(trained(run, step + 2), trained(whole, step + 2))


@pytest.fixture
def kill_in_call(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str, int, signal.Signals], None]:
    """Send this process a signal within the n-th call of a method, of modules in training, once."""

    def arrange(owner: type, method: str, call: int, number: signal.Signals) -> None:
        original = getattr(owner, method)
        calls = 0

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += getattr(self, "training", True)  # the loss that is only compared is not meant
            if calls == call:
                os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, wrapped)

    return arrange


Kill = Callable[[type, str, int, signal.Signals], None]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_within_a_step_lets_the_step_finish(
    number: signal.Signals, code: int, flags: Flags, tmp_path: Path, kill_in_call: Kill
) -> None:
    kill_in_call(UNet2DConditionModel, "forward", 2, number)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        main(flags(tmp_path / "run", max_train_steps=5))
    assert ended.value.code == code
    assert signal.getsignal(number) == before
    assert_saved(tmp_path / "run", 2)


@pytest.mark.parametrize(("call", "step"), [(1, 0), (3, 2)])
def test_a_signal_within_the_samples_gives_them_up_until_the_run_goes_on(
    call: int, step: int, flags: Flags, train: Train, tmp_path: Path, kill_in_call: Kill
) -> None:
    """The run stops right there, so that the resumed one draws what is missing: the base's grid, too."""
    common: dict[str, Any] = {"num_validation_images": 2, "validation_steps": 2, "max_train_steps": 3, "resolution": 32}
    kill_in_call(Sampler, "images", call, signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(flags(tmp_path / "run", **common))
    assert ended.value.code == 143
    assert checkpoints(tmp_path / "run") == [f"step-{step:06d}"]
    assert not (tmp_path / "run" / "samples" / f"step-{step:06d}").exists()
    resumed = train("run", resume="latest", **common)
    assert same_tensors(samples(resumed), samples(train("whole", **common)))


def test_a_signal_after_the_last_step_does_not_unmake_the_run(flags: Flags, tmp_path: Path, kill_in_call: Kill) -> None:
    kill_in_call(UNet2DConditionModel, "forward", 3, signal.SIGTERM)
    main(flags(tmp_path / "run", max_train_steps=3))
    assert provenance(tmp_path / "run")["status"] == "finished"
    assert (tmp_path / "run" / "ether_weights.safetensors").is_file()


def test_a_second_ctrl_c_stops_at_once() -> None:
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process to kill it")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_killed_process_always_leaves_a_checkpoint_that_loads(train: Train, tmp_path: Path) -> None:
    """Training that does little but save is killed 20 times, ever later in what it does to files."""
    changes: dict[str, Any] = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "resolution": 16}
    whole = train("whole", max_train_steps=1, **changes)
    run = train(max_train_steps=1, **changes)
    newest, half_written, rose = 1, 0, 0
    for moment in range(5, 165, 8):
        child = os.fork()
        if child == 0:
            try:
                with before_file_calls(lambda call, moment=moment: die() if call == moment else None):
                    train(max_train_steps=10_000, resume="latest", **changes)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        found = list_checkpoints(run / "checkpoints")
        half_written += any(path.name.startswith(".") for path in (run / "checkpoints").iterdir())
        for path in found:
            step = step_of(path)
            assert trained(run, step).keys() == trained(whole, 1).keys()
            assert int(optimizer_state(run, step)["state"][0]["step"]) == step
        assert step_of(found[-1]) >= newest
        rose += step_of(found[-1]) > newest
        newest = step_of(found[-1])
    assert half_written > 0, "no kill hit a save: the test has shown nothing"
    assert rose > 0, "no kill hit a run that had saved: the test has shown nothing"
    train(max_train_steps=newest + 1, resume="latest", **changes)
    train("whole", max_train_steps=newest + 1, resume="latest", **changes)
    assert same_tensors(trained(run, newest + 1), trained(tmp_path / "whole", newest + 1))
    assert all(torch.isfinite(value).all() for value in trained(run, newest + 1).values())


@contextmanager
def on_a_terminal(command: list[str], environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process on a terminal of its own, and the other end of this; the process is gone afterwards."""
    terminal, own = os.openpty()
    process = subprocess.Popen(command, env=environment, stdin=own, stdout=own, stderr=own, start_new_session=True)
    os.close(own)
    try:
        yield process, terminal
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no terminals")
def test_a_closed_terminal_ends_the_program_with_a_checkpoint(
    flags: Flags, program: list[str], one_thread: dict[str, str], tmp_path: Path
) -> None:
    """What the program says from then on goes nowhere, and is no error."""
    run = tmp_path / "run"
    command = [*program, *flags(run, max_train_steps=10_000, resolution=16)]
    with on_a_terminal(command, one_thread) as (process, terminal):
        threading.Thread(target=_drain, args=(terminal,), daemon=True).start()
        while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        os.close(terminal)
        assert process.wait(timeout=300) == 128 + signal.SIGHUP
    assert_saved(run, step_of(list_checkpoints(run / "checkpoints")[-1]))


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no terminals")
def test_a_program_that_ignores_the_hangup_goes_on_without_its_terminal(
    flags: Flags, program: list[str], one_thread: dict[str, str], tmp_path: Path
) -> None:
    """As after ``trap '' HUP`` in the shell: bars, messages and the lines of its end go nowhere."""
    run = tmp_path / "run"
    command = [*program, *flags(run, max_train_steps=60, resolution=16, validation_steps=10)]
    with on_a_terminal(["env", "--ignore-signal=HUP", *command], one_thread) as (process, terminal):
        os.read(terminal, 1)
        os.close(terminal)
        assert process.wait(timeout=300) == 0
    assert provenance(run)["status"] == "finished"
    assert step_of(list_checkpoints(run / "checkpoints")[-1]) == 60


def _drain(terminal: int) -> None:
    """Read what is said, until the terminal is closed."""
    try:
        while os.read(terminal, 4096):
            pass
    except OSError:
        pass


def test_nohup_keeps_the_run_going() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupts.received
    finally:
        signal.signal(signal.SIGHUP, before)
