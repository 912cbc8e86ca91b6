"""Latents of Qwen-Image's autoencoder: it was made for videos, and has statistics of each channel; packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ether_diffusion.families.transformer import FlowTransformer


class VideoLatents(FlowTransformer):
    """A flow transformer on pictures that are videos of one frame to its autoencoder."""

    LATENTS = "(z - mean) / deviation of each channel"

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.pipe.vae.config.z_dim)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent and side."""
        return 2 ** len(self.pipe.vae.temperal_downsample)

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Of a video of one frame."""
        mean, std = super().encode(pixel_values[:, :, None])
        return mean[:, :, 0], std[:, :, 0]

    def scaled(self, encoded: Tensor) -> Tensor:
        """(z - mean) / std of each channel."""
        mean, std = self._statistics(encoded)
        return (encoded.float() - mean) / std

    def unscaled(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """z = latents · std + mean from packed latents."""
        latents = self.unpacked(drawn, height, width).float()
        mean, std = self._statistics(latents)
        return latents * std + mean

    def decode(self, encoded: Tensor) -> Tensor:
        """The one frame of each video."""
        return super().decode(encoded[:, :, None])[:, :, 0]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = (torch.tensor(each, device=like.device) for each in (config.latents_mean, config.latents_std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
