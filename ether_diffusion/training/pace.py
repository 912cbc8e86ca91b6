"""How fast a training is, and how long it takes still."""

from __future__ import annotations

from collections import deque
from statistics import median

from ether_diffusion.training.sections import LoopSection

FIRST = 5
"""After so many steps the time of a step is known; the very first ones are slower."""
RECENT = 50
"""The time of a step is the median of so many last ones."""


class Pace:
    """The times of a training's steps and of what is done at the steps with samples.

    Args:
        section: how many steps there are, and which have samples.
    """

    def __init__(self, section: LoopSection) -> None:
        self.section = section
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._grid = 0.0

    @property
    def known(self) -> bool:
        """Whether enough steps were taken."""
        return len(self._steps) >= FIRST

    @property
    def step_seconds(self) -> float:
        """Seconds of a step.

        Raises:
            statistics.StatisticsError: no step was taken.
        """
        return median(self._steps)

    def step(self, seconds: float) -> None:
        """Note the time of an optimisation step."""
        self._steps.append(seconds)

    def grid(self, seconds: float) -> None:
        """Note the time of what is done at a step with samples: they are drawn and scored, the report is written."""
        self._grid = seconds

    def grids_after(self, step: int) -> int:
        """How many steps with samples come after a step."""
        last, every = self.section.max_train_steps, self.section.validation_steps
        return last // every - step // every + bool(last % every) if step < last else 0

    def left(self, step: int) -> float | None:
        """Seconds that the training takes after a step; None while the time of a step is not known."""
        if not self.known:
            return None
        return (self.section.max_train_steps - step) * self.step_seconds + self.grids_after(step) * self._grid
