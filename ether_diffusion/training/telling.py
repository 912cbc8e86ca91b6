"""What a training says while it runs: one bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from tqdm import tqdm

from ether_diffusion.bars import hidden
from ether_diffusion.page.text import data_size, duration
from ether_diffusion.training.pace import FIRST, Pace
from ether_diffusion.training.sections import LoopSection

logger = logging.getLogger(__name__)

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
LINES = 20
"""A log gets a line after each such part of the steps …"""
SOONEST, LATEST = 10.0, 600.0
"""… but not within the first number of seconds after the last line, and in any case after the second."""


class Telling:
    """The progress of a training, told by the first process.

    On a terminal a bar shows steps, loss, learning rate and the time that is left. Where the standard error is none,
    lines of a log say the same. After the first steps it is told once how long the training is going to take, and how
    much memory it uses.

    Args:
        section: the steps.
        step: that the training starts after.
        device: of the training, whose memory is told.
    """

    def __init__(self, section: LoopSection, step: int, device: torch.device) -> None:
        self.total, self.first, self.device = section.max_train_steps, step, device
        self.pace = Pace(section)
        self.bar: tqdm[Any] = tqdm(
            total=self.total,
            initial=step,
            desc="training",
            bar_format=BAR,
            disable=hidden(),
            dynamic_ncols=True,
            leave=False,
        )
        self._line_at, self._line_step = time.perf_counter(), step

    def __enter__(self) -> Telling:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def step(self, step: int, loss: float, rate: float, seconds: float) -> None:
        """Tell of a step that was taken.

        Args:
            step: its number.
            loss: its mean loss.
            rate: learning rate of the denoiser.
            seconds: that it took.
        """
        self.pace.step(seconds)
        left = self.pace.left(step)
        said = f"loss {loss:.4f}, rate {rate:.2e}" + ("" if left is None else f", {duration(left)} left")
        self.bar.set_postfix_str(said, refresh=False)
        self.bar.update()
        if step == self.first + FIRST and left:
            grids = self.pace.grids_after(step)
            logger.info(
                "%s a step: about %s for the %d steps%s that are left; %s",
                f"{self.pace.step_seconds:.2f} s",
                duration(left),
                self.total - step,
                f" and {grids} set{'s' * (grids > 1)} of samples" if grids else "",
                memory_used(self.device),
            )
        if self.bar.disable and self._is_line_due(step):
            self._line_at, self._line_step = time.perf_counter(), step
            logger.info("step %d of %d: %s", step, self.total, said)

    def _is_line_due(self, step: int) -> bool:
        if step == self.total or not self.pace.known:
            return step == self.total
        passed = time.perf_counter() - self._line_at
        return passed >= LATEST or (passed >= SOONEST and (step - self._line_step) * LINES >= self.total)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """What is done at a step with samples: the bar says so, and its time is noted."""
        began = time.perf_counter()
        self.bar.set_description_str("drawing samples")
        yield
        self.bar.set_description_str("training", refresh=False)
        self.pace.grid(time.perf_counter() - began)


def memory_used(device: torch.device) -> str:
    """The memory that this process uses, as measured: on a GPU the peak of torch, else what the process holds now."""
    if device.type == "cuda":
        return f"at most {data_size(torch.cuda.max_memory_allocated(device))} of the GPU's memory so far"
    return f"{data_size(psutil.Process().memory_info().rss)} of memory in use"
