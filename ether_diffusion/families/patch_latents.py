"""Latents of FLUX.2's autoencoder: 2 x 2 patches, normalised by the running statistics of its batch norm; no scale."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ether_diffusion.families.flow import Size
from ether_diffusion.families.transformer import PATCH, FlowTransformer


class PatchLatents(FlowTransformer):
    """A flow transformer whose tokens are the latents.

    Latents are patches: four times the autoencoder's channels at half its height and width.
    """

    LATENTS = "(patches of z - mean) / deviation of each channel"

    @property
    def latent_channels(self) -> int:
        """Of a patch."""
        return PATCH**2 * int(self.pipe.vae.config.latent_channels)

    @property
    def vae_factor(self) -> int:
        """Pixels per patch and side."""
        return PATCH * 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def divisor(self) -> int:
        """Pixels of a patch."""
        return self.vae_factor

    @property
    def native_resolution(self) -> int:
        """1024 pixels, or the pipeline's own default."""
        return int(getattr(self.pipe, "default_sample_size", 128)) * self.vae_factor // PATCH

    def tokens_of(self, size: Size) -> int:
        """One for each patch."""
        return size[0] * size[1]

    def patched(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents as patches, (batch, 4 channels, h / 2, w / 2); of each channel the four places."""
        return F.pixel_unshuffle(latents, PATCH)

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the patches, not normalised."""
        mean, std = super().encode(pixel_values)
        return self.patched(mean), self.patched(std)

    def scaled(self, encoded: Tensor) -> Tensor:
        """(patches - mean) / deviation of the batch norm."""
        mean, deviation = self.statistics(encoded.device)
        return (encoded.float() - mean) / deviation

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the batch norm, (1, channels, 1, 1) fp32, there; the autoencoder may be elsewhere."""
        norm, epsilon = self.pipe.vae.bn, self.pipe.vae.config.batch_norm_eps
        mean, variance = (each.to(device).view(1, -1, 1, 1).float() for each in (norm.running_mean, norm.running_var))
        return mean, (variance + epsilon).sqrt()

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The tokens as patches."""
        tokens: Tensor = output[0]
        return tokens.transpose(1, 2).unflatten(2, noisy.shape[-2:])
