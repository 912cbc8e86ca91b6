"""The exponential moving average of what is trained, which is saved and drawn with in place of the last step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

WARM_UP = 10
"""The decay is at most one half after 8 steps, 0.9 after 80, 0.99 after 890."""


class Averages:
    """a ← d · a + (1 − d) · p after every step, with d = min(decay, (1 + step) / (10 + step)): the warm-up
    of diffusers' EMAModel one step ahead, which copies the parameters at step 1.

    Without the warm-up of d a run of a few hundred steps would keep most of its random start. Averaged vectors of an
    adapter are of any length; they are normalised in its forward, like all. ``AveragedModel`` of torch would copy
    modules with their hooks on the base; here only the trained tensors are copied.

    Args:
        trained: the trained parameters by name, on their device.
        decay: the largest d, above 0 and below 1.

    Attributes:
        values: the averages by name, fp32.
    """

    def __init__(self, trained: Mapping[str, Tensor], decay: float) -> None:
        self.trained = dict(trained)
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def update(self, step: int) -> None:
        """Take in the parameters after ``step`` steps, counted from 1."""
        decay = min(self.decay, (1 + step) / (WARM_UP + step))
        current = [parameter.detach() for parameter in self.trained.values()]
        get_ema_multi_avg_fn(decay)(list(self.values.values()), current, step)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Go on from these averages."""
        _copy(values, self.values)

    def take_over(self) -> None:
        """Make the parameters the averages, for good: at the end of a run."""
        _copy(self.values, self.trained)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The averages in place of the parameters, which come back bit for bit."""
        kept = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.take_over()
        try:
            yield
        finally:
            _copy(kept, self.trained)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy in place, so that what is computed from a parameter and kept with its version is not used again."""
    for name, tensor in into.items():
        tensor.copy_(values[name])
