"""The settings of the paper's studies, beyond those of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ether_diffusion.evaluation.subjects.settings import BenchmarkConfig, DerivedConfig

DISTANCES = (0.1, 0.2, 0.5, 1.0, 2**0.5, 2.0, 4.0, 8.0)
"""‖T - I‖_F of a block under a random transform; each method takes those that it can have."""
PERTURBED = ("ether", "ether_plus", "oft", "naive")
"""The methods whose random transforms are drawn."""
ORTHOGONAL, ROW_NORMS = "orthogonal", "row norms"
"""How a trained Naive adapter is changed: :mod:`~ether_diffusion.evaluation.paper.intervention`."""


@dataclass
class RatesConfig(BenchmarkConfig):
    """A benchmark whose arms have several learning rates.

    Attributes:
        tuned_rates: the rate of each arm that was found on other subjects; with them, what multiples of it cost is
            told, too.
        factor: the multiple at which the losses are compared.
        reference: the arm that the others are compared with there.
    """

    tuned_rates: dict[str, float] | None = None
    factor: float = 10.0
    reference: str = "ether_plus"

    def __post_init__(self) -> None:
        super().__post_init__()
        for arm in self.tuned_rates or {}:
            if arm not in self.arms:
                raise ValueError(f"tuned_rates names {arm}, which is no arm: {', '.join(self.arms)}")


@dataclass
class EnergyConfig(DerivedConfig):
    """A benchmark of Naive, each arm also changed after its training."""

    WAYS: ClassVar[tuple[str, ...]] = (ORTHOGONAL, ROW_NORMS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strengths:
            raise ValueError("strengths are of an adapter, and the changed weights have none: leave it out")
