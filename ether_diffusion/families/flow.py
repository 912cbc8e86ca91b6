"""The objective of flow matching: x_σ = (1 - σ) x₀ + σ ε, and the denoiser is asked for the velocity ε - x₀."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ether_diffusion.families.settings import Weighting

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

OTHER_SIGMAS = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
"""Settings of a solver that come before its ``use_flow_sigmas``."""
Size = tuple[int, int]
"""Height and width of latents."""
SMALLEST_SIGMA = 1e-3
"""Below it the weight of sigma_sqrt, σ⁻², does not grow further: the smallest σ of diffusers' tables."""


@dataclass(frozen=True)
class Sigmas:
    """How σ is drawn before it is shifted (arXiv 2403.03206, section 3.1); fp64 in (0, 1).

    Attributes:
        weighting_scheme: how σ is drawn, or what the loss is weighted with.
        logit_mean: of logit_normal: σ = sigmoid(mean + std n) with n normal; a positive one is more noise, as in the
            paper (diffusers' scripts count the other way).
        logit_std: likewise.
        mode_scale: s of mode: σ = 1 - u - s (cos²(πu/2) - 1 + u) with u uniform.
    """

    weighting_scheme: Weighting = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def draw(self, random: torch.Generator) -> Tensor:
        """σ of a sample."""
        if self.weighting_scheme == "logit_normal":
            normal = torch.randn((), generator=random, dtype=torch.float64)
            return torch.sigmoid(self.logit_mean + self.logit_std * normal)
        u = torch.rand((), generator=random, dtype=torch.float64)
        if self.weighting_scheme == "mode":
            return 1 - u - self.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        return u

    def spread(self, number: int) -> Tensor:
        """The middles of ``number`` equal parts of (0, 1)."""
        return (torch.arange(number, dtype=torch.float64) + 0.5) / number


@dataclass(frozen=True)
class FlowMatching:
    """How σ is shifted, and how samples are weighted; times are σ, fp32 in (0, 1).

    Attributes:
        shift: from the size of latents (height, width) to the shift s of every σ, as in drawing.
        levels: how σ is drawn.
    """

    shift: Callable[[Size], float]
    levels: Sigmas = field(default_factory=Sigmas)

    def times(self, levels: Tensor, size: Size) -> Tensor:
        """σ as drawing shifts it for latents of ``size``: s σ / (1 + (s - 1) σ), fp32.

        The stretch to a terminal σ (Qwen-Image) is left out: the denoiser is trained at the σ below it, too.
        """
        shift = self.shift(size)
        return (shift * levels / (1 + (shift - 1) * levels)).float()

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """(1 - σ) latents + σ noise; all (batch, channels, h, w), times (batch,)."""
        sigma = times.to(latents.dtype).view(-1, *[1] * (latents.dim() - 1))
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The velocity noise - latents."""
        return noise - latents

    def losses(self, prediction: Tensor, target: Tensor, times: Tensor) -> Tensor:
        """Weighted mean squared error of every sample, (batch,) in fp32.

        The weight is σ⁻² for sigma_sqrt, 2 / (π (1 - 2σ + 2σ²)) for cosmap, else 1.
        """
        losses = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
        if self.levels.weighting_scheme == "sigma_sqrt":
            return losses * times.clamp(min=SMALLEST_SIGMA) ** -2
        if self.levels.weighting_scheme == "cosmap":
            return losses * 2 / (math.pi * (1 - 2 * times + 2 * times**2))
        return losses


def scheduler_shift(scheduler: SchedulerMixin, mu: Callable[[Size], float]) -> Callable[[Size], float]:
    """From the size of latents to the shift s of a scheduler.

    Args:
        scheduler: of the base.
        mu: the logarithm of the shift, where the scheduler shifts by size.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        return mu if config.get("time_shift_type") == "linear" else lambda size: math.exp(mu(size))
    fixed = float(config.get("flow_shift", config.get("shift", 1.0)))  # solvers of other noise have a name of their own
    return lambda size: fixed


def shift_by_tokens(scheduler: SchedulerMixin, max_shift: float = 1.15) -> Callable[[int], float]:
    """From the number of tokens to the logarithm of the shift, a straight line between two points of the scheduler's.

    Args:
        scheduler: of the base.
        max_shift: where its settings do not name one.
    """
    config = scheduler.config
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (last - first)
    return lambda tokens: tokens * slope + (low - slope * first)


def scheduler_misfit(scheduler: SchedulerMixin) -> str | None:
    """Why a scheduler's noise is not one that :class:`FlowMatching` trains; None where it is."""
    config, kind = scheduler.config, type(scheduler).__name__
    if config.get("use_flow_sigmas"):
        if (predicted := config.get("prediction_type")) != "flow_prediction":
            return f"its scheduler takes the answer for {predicted}, and it should be flow_prediction"
        if other := next((name for name in OTHER_SIGMAS if config.get(name)), None):
            return f"its scheduler takes σ from {other} before those of flow matching"
        return None
    if not kind.startswith("FlowMatch"):
        return f"its scheduler is {kind}, and it should be one of flow matching"
    if config.get("invert_sigmas"):
        return "its scheduler inverts σ (invert_sigmas)"
    return None
