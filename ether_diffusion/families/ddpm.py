"""What the families with DDPM noise share: its objective, and an autoencoder whose latents are only scaled."""

from __future__ import annotations

from torch import Tensor

from ether_diffusion.families.diffusion import Diffusion, scheduler_misfit
from ether_diffusion.families.parts import channels_misfit, statistics_misfit
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.settings import ObjectiveSettings


class DiffusionFamily(Family):
    """A denoiser trained on DDPM noise; families say how it is called and how prompts are encoded."""

    OBJECTIVE = "DDPM noise"
    TIME = "timestep"
    LATENTS = "z · scale"
    OPTIONS = frozenset({"snr_gamma"})

    def misfit(self) -> str | None:
        """Another kind of noise, statistics of the latents that nothing here applies, or more input than latents."""
        return (
            scheduler_misfit(self.pipe.scheduler)
            or statistics_misfit(self.pipe.vae)
            or channels_misfit(self.denoiser, self.latent_channels)
        )

    def objective(self, settings: ObjectiveSettings) -> Diffusion:
        """DDPM noise, as the base's scheduler has it."""
        from diffusers import DDPMScheduler

        return Diffusion(DDPMScheduler.from_config(self.pipe.scheduler.config), settings.snr_gamma)

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the pictures that the base was made for."""
        return int(self.denoiser.config.sample_size) * self.vae_factor

    def scaled(self, encoded: Tensor) -> Tensor:
        """Times the autoencoder's scaling factor."""
        return encoded.float() * self.pipe.vae.config.scaling_factor

    def unscaled(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """By the autoencoder's scaling factor."""
        return drawn.to(self.pipe.vae.dtype) / self.pipe.vae.config.scaling_factor
