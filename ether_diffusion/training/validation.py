"""The loss on fixed pictures with fixed noise at fixed times: it shows learning better than the training loss does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ether_diffusion.data.plan import Draw
from ether_diffusion.families.protocol import Family, Objective
from ether_diffusion.training.batches import Batch, TrainingSamples, stack, to_batch
from ether_diffusion.training.model import DenoisingModel
from ether_diffusion.training.placement import present

PICTURES = 8
"""At most so many pictures are looked at."""
TIMES = 4
"""Each picture is seen at so many levels of noise."""
STREAM = "validation"
"""Of the randomness: crops and noise are those of the pictures' numbers, the same in every run with the seed."""


@dataclass
class Validation:
    """The first pictures of a source, each at a few fixed levels of noise.

    Attributes:
        samples: the pictures, of the stream :data:`STREAM`.
        family: of the base.
        objective: the loss.
        device: where they are put.
    """

    samples: TrainingSamples[Any]
    family: Family
    objective: Objective
    device: torch.device

    @cached_property
    def batches(self) -> list[Batch]:
        """One for each picture: the same picture with several noises and times."""
        return [self._batch(index) for index in range(min(PICTURES, len(self.samples) or PICTURES))]

    def _batch(self, index: int) -> Batch:
        drawn = stack([self.samples[Draw(index, TIMES * index + number)] for number in range(TIMES)])
        drawn["levels"] = self.objective.levels.spread(TIMES)
        with present(self.device, self.family.pipe.vae):
            return to_batch(drawn, self.family, self.objective, self.device)

    @torch.no_grad()
    def loss(self, model: DenoisingModel, autocast: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
        """``loss``, the mean over pictures and levels, and ``by_time``, the means at each level of ``times``.

        The model is seen as it is at this moment, in evaluation mode; weights of the loss apply.
        """
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with autocast():
                losses = torch.stack([model.losses(batch) for batch in self.batches])
        finally:
            for module in training:
                module.training = True
        by_time = losses.mean(0).tolist()
        times = self.batches[0].times.tolist()
        return {"loss": float(losses.mean()), "times": times, "by_time": by_time}
