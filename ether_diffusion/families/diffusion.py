"""The objective of bases with DDPM noise: noisy latents in, noise or velocity out, one loss per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, SchedulerMixin

PREDICTIONS = ("epsilon", "v_prediction")
"""What a base may predict."""


@dataclass(frozen=True)
class Timesteps:
    """Timesteps, each equally likely.

    Attributes:
        number: of the base's noise schedule.
    """

    number: int

    def draw(self, random: torch.Generator) -> Tensor:
        """A timestep."""
        return torch.randint(self.number, (), generator=random)

    def spread(self, number: int) -> Tensor:
        """The middles of ``number`` equal parts of all timesteps."""
        return ((torch.arange(number) + 0.5) / number * self.number).long()


@dataclass(frozen=True)
class Diffusion:
    """What a UNet is asked to predict, and how samples are weighted; times are timesteps, int64.

    Attributes:
        noise_scheduler: of the base; its ``prediction_type`` is epsilon or v_prediction.
        snr_gamma: γ of min-SNR weighting (arXiv 2303.09556), None for none.
    """

    noise_scheduler: DDPMScheduler
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        kind = self.noise_scheduler.config.prediction_type
        if kind not in PREDICTIONS:
            raise ValueError(f"the base predicts {kind!r}; this program trains {' and '.join(PREDICTIONS)}")

    @property
    def levels(self) -> Timesteps:
        """The timesteps of the noise schedule."""
        return Timesteps(self.noise_scheduler.config.num_train_timesteps)

    def times(self, levels: Tensor, size: tuple[int, int]) -> Tensor:
        """The timesteps as they are, whatever the size."""
        return levels

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """√ᾱ latents + √(1 - ᾱ) noise; all (batch, channels, h, w), times (batch,)."""
        noisy: Tensor = self.noise_scheduler.add_noise(latents, noise, times)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The noise, or the velocity √ᾱ noise - √(1 - ᾱ) latents (arXiv 2202.00512)."""
        if self.noise_scheduler.config.prediction_type == "epsilon":
            return noise
        velocity: Tensor = self.noise_scheduler.get_velocity(latents, noise, times)
        return velocity

    def losses(self, prediction: Tensor, target: Tensor, times: Tensor) -> Tensor:
        """Weighted mean squared error of every sample, (batch,) in fp32.

        The weight is min(SNR, γ) / SNR for epsilon and min(SNR, γ) / (SNR + 1) for v_prediction.
        """
        losses = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
        if self.snr_gamma is None:
            return losses
        from diffusers.training_utils import compute_snr  # imports torchvision, where that is installed

        snr = compute_snr(self.noise_scheduler, times).float()
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            return losses * snr.clamp(max=self.snr_gamma) / (snr + 1)
        # min(SNR, γ) / SNR = min(1, γ / SNR), which stays right where the SNR is zero
        return losses * (self.snr_gamma / snr).clamp(max=1)


def scheduler_misfit(scheduler: SchedulerMixin) -> str | None:
    """Why a scheduler's noise is not one that :class:`Diffusion` trains; None where it is."""
    config, kind = scheduler.config, type(scheduler).__name__
    other = "EDM" in kind or "FlowMatch" in kind or "sigma_data" in config or config.get("use_flow_sigmas")
    other = other or config.get("timestep_type") == "continuous"
    if other or "beta_start" not in config:
        return f"its scheduler is {kind}, whose noise is not that of a DDPM"
    if (predicted := config.get("prediction_type", "epsilon")) not in PREDICTIONS:
        return f"it predicts {predicted}; bases with DDPM noise are trained that predict {' or '.join(PREDICTIONS)}"
    if predicted == "epsilon" and config.get("rescale_betas_zero_snr"):
        return (
            "it predicts epsilon, and with rescale_betas_zero_snr its last timestep is nothing but noise, "
            "which is its own answer: a base with zero terminal SNR should predict v_prediction"
        )
    return None
