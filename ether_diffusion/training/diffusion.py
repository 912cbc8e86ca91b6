"""The denoising objective: noisy latents in, noise or velocity out, one loss per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """What the UNet is asked to predict, and how samples are weighted.

    Attributes:
        noise_scheduler: of the base; its ``prediction_type`` is epsilon or v_prediction.
        snr_gamma: γ of min-SNR weighting (arXiv 2303.09556), None for none.
    """

    noise_scheduler: DDPMScheduler
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        kind = self.noise_scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"the base predicts {kind!r}; this program trains epsilon and v_prediction")

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ latents + √(1 - ᾱ) noise; all (batch, channels, h, w), timesteps (batch,)."""
        noisy: Tensor = self.noise_scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, or the velocity √ᾱ noise - √(1 - ᾱ) latents (arXiv 2202.00512)."""
        if self.noise_scheduler.config.prediction_type == "epsilon":
            return noise
        velocity: Tensor = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def losses(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """Weighted mean squared error of every sample, (batch,) in fp32.

        The weight is min(SNR, γ) / SNR for epsilon and min(SNR, γ) / (SNR + 1) for v_prediction.
        """
        losses = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
        if self.snr_gamma is None:
            return losses
        from diffusers.training_utils import compute_snr  # imports torchvision, where that is installed

        snr = compute_snr(self.noise_scheduler, timesteps).float()
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            return losses * snr.clamp(max=self.snr_gamma) / (snr + 1)
        # min(SNR, γ) / SNR = min(1, γ / SNR), which stays right where the SNR is zero
        return losses * (self.snr_gamma / snr).clamp(max=1)
