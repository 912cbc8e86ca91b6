"""The settings of the paper's studies, beyond those of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ether_diffusion.config import EtherConfig
from ether_diffusion.evaluation.subjects.settings import BenchmarkConfig, DerivedConfig
from ether_diffusion.registry import METHODS, OWN_METHODS

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
class BlocksConfig(BenchmarkConfig):
    """A benchmark whose arms differ in ``n_blocks``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.adapters

    @property
    def adapters(self) -> dict[str, EtherConfig]:
        """The adapter of every arm.

        Raises:
            ValueError: an arm is none of this library's methods.
        """
        found = {}
        for arm in self.arms:
            settings = self.settings_of(arm)
            method = settings.get("method", EtherConfig.method)
            if method not in OWN_METHODS:
                raise ValueError(f"arm {arm}: blocks are studied for {', '.join(OWN_METHODS)}, not {method}")
            names = [name for name in METHODS[method].settings if name in settings]
            found[arm] = EtherConfig(method, **{name: settings[name] for name in names})
        return found


@dataclass
class EnergyConfig(DerivedConfig):
    """A benchmark of Naive, each arm also changed after its training."""

    WAYS: ClassVar[tuple[str, ...]] = (ORTHOGONAL, ROW_NORMS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strengths:
            raise ValueError("strengths are of an adapter, and the changed weights have none: leave it out")
