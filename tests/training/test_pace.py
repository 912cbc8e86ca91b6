"""The estimate of how long a training takes still: against steps and grids counted one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ether_diffusion.training.pace import FIRST, Pace
from ether_diffusion.training.sections import LoopSection

SECTION = LoopSection(Path("run"), 60, 1, 1.0, None, 20, 20, 4)


def pace(steps: int, every: int) -> Pace:
    return Pace(dataclasses.replace(SECTION, max_train_steps=steps, validation_steps=every))


@pytest.mark.parametrize(("steps", "every"), [(60, 20), (61, 20), (5, 20), (7, 1)])
def test_steps_with_samples_are_counted(steps: int, every: int) -> None:
    known = pace(steps, every)
    due = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
    for now in range(steps + 1):
        assert known.grids_after(now) == sum(step > now for step in due), now


def test_nothing_is_known_before_the_first_steps() -> None:
    known = pace(60, 20)
    for _ in range(FIRST - 1):
        known.step(1.0)
    assert known.left(4) is None
    known.step(1.0)
    assert known.left(5) == 55.0


def test_what_is_left_is_steps_and_grids_and_a_slow_first_step_does_not_count() -> None:
    known = pace(60, 20)
    known.grid(7.0)
    for seconds in (90.0, 0.5, 0.5, 0.5, 0.5):
        known.step(seconds)
    assert known.left(5) == 55 * 0.5 + 3 * 7.0
    assert known.left(20) == 40 * 0.5 + 2 * 7.0
    assert known.left(60) == 0


def test_it_follows_a_machine_that_becomes_slower() -> None:
    known = pace(1000, 1000)
    for _ in range(100):
        known.step(1.0)
    for _ in range(26):
        known.step(3.0)
    assert known.step_seconds == 3.0
