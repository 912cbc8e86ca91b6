"""What a training tells while it runs: a bar for a terminal, few lines for a log."""

from __future__ import annotations

import io
import logging
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from ether_diffusion.page.text import data_size
from ether_diffusion.training import telling
from ether_diffusion.training.sections import LoopSection
from ether_diffusion.training.telling import Telling, memory_used

CPU = torch.device("cpu")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the module sees, in its first entry."""
    now = [0.0]
    monkeypatch.setattr(telling.time, "perf_counter", lambda: now[0])
    return now


def steps(total: int, step_seconds: float, clock: list[float], first: int = 0) -> None:
    section = LoopSection(Path("run"), total, 1, 1.0, None, total, total, 4)
    with Telling(section, first, CPU) as told:
        with told.drawing():
            clock[0] += 3
        for step in range(first + 1, total + 1):
            clock[0] += step_seconds
            told.step(step, 0.25, 1e-3, step_seconds)


def test_a_log_gets_few_lines_and_one_estimate(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ether_diffusion"):
        steps(1000, 1.0, clock)
    said = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"1\.00 s a step: about 16 min 38 s for the 995 steps and 1 set of samples that are left; .* of memory in use",
        said.pop(0),
    )
    assert said[0] == "step 50 of 1000: loss 0.2500, rate 1.00e-03, 15 min 53 s left"
    assert said[-1] == "step 1000 of 1000: loss 0.2500, rate 1.00e-03, 0 s left"
    assert [int(line.split()[1]) for line in said] == list(range(50, 1001, 50))


def test_a_quick_training_says_no_more_than_a_line_in_ten_seconds(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ether_diffusion"):
        steps(1000, 0.02, clock)
    numbers = [int(record.getMessage().split()[1]) for record in caplog.records[1:]]
    assert numbers == pytest.approx([350, 850, 1000], abs=2)


def test_a_slow_training_says_a_line_in_ten_minutes(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ether_diffusion"):
        steps(5000, 60.0, clock)
    numbers = [int(record.getMessage().split()[1]) for record in caplog.records[1:]]
    assert numbers[:3] == [10, 20, 30]


def test_a_training_that_goes_on_estimates_from_its_own_first_steps(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ether_diffusion"):
        steps(100, 1.0, clock, first=50)
    assert "about 48 s for the 45 steps and 1 set of samples" in caplog.records[0].getMessage()


def test_a_terminal_gets_a_bar_with_loss_rate_and_time_left(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(telling, "tqdm", partial(tqdm, mininterval=0))
    with caplog.at_level(logging.INFO, "ether_diffusion"):
        steps(30, 1.0, clock)
    assert len(caplog.records) == 1  # the estimate; no line for a step
    frames = re.split(r"[\r\n]+", screen.getvalue())
    shown = re.compile(r"training: +\d+%\|.*\| \d+/30, loss 0\.2500, rate 1\.00e-03, \d+ s left")
    assert any(map(shown.match, frames))
    assert any(each.startswith("drawing samples:") for each in frames)


def test_a_bar_is_hidden_where_a_log_is_written(
    clock: list[float], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ether_diffusion"):  # the log itself is another test's
        steps(30, 1.0, clock)
    assert capsys.readouterr() == ("", "")


def test_memory_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    held = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").exists() else None
    if held is None:
        pytest.skip("the oracle is /proc")
    said = memory_used(CPU)
    assert said.split(" of ")[0] in {data_size(held + more * 10**5) for more in range(-500, 500)}
    assert said.endswith(" of memory in use")
