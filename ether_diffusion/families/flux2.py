"""FLUX.2 klein and dev: a language model as text encoder, patches normalised by the autoencoder's batch norm."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.transformer import PATCH, FlowTransformer

STEPS = 50
"""Steps of drawing for which the shift is taken: it depends on their number, and this is the pipelines' default."""


class Flux2(FlowTransformer):
    """FLUX.2 (Black Forest Labs 2025): klein, and dev.

    Latents are 2 x 2 patches: four times the autoencoder's channels at half its height and width.
    """

    NAME = "flux2"
    TITLE = "FLUX.2"
    PIPELINES = ("Flux2KleinPipeline", "Flux2Pipeline")
    OPTIONS = FlowTransformer.OPTIONS | {"guidance_scale_training"}
    STEPS = STEPS
    GUIDANCE = 4.0
    LENGTH = 512
    CONTROL_PLACE = "x_embedder"

    @property
    def distilled(self) -> str | None:
        """The 4-step versions of klein say it in their pipeline's settings."""
        return "its pipeline says is_distilled" if self.pipe.config.get("is_distilled") else None

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

    def tokens_of(self, size: tuple[int, int]) -> int:
        """One for each patch."""
        return size[0] * size[1]

    def shift(self) -> Callable[[int], float]:
        """The pipelines' fit of the shift to the number of tokens, for 50 steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return lambda tokens: float(compute_empirical_mu(tokens, STEPS))

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the patches, not normalised."""
        mean, std = super().encode(pixel_values)
        return F.pixel_unshuffle(mean, PATCH), F.pixel_unshuffle(std, PATCH)

    def scaled(self, encoded: Tensor) -> Tensor:
        """Normalised by the running statistics of the autoencoder's batch norm; no scale."""
        norm = self.pipe.vae.bn
        mean = norm.running_mean.view(1, -1, 1, 1).float()
        deviation = (norm.running_var.view(1, -1, 1, 1).float() + self.pipe.vae.config.batch_norm_eps).sqrt()
        return (encoded.float() - mean) / deviation

    def unscaled(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """The pipeline undoes patches and normalisation itself."""
        return drawn.float()

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, features): three layers of the language model side by side."""
        embeds, _ = self.encode_text(prompts)
        return {"prompt_embeds": embeds}

    def encode_for_drawing(self, prompts: Sequence[str]) -> dict[str, Any]:
        """prompt_embeds, and for klein negative_prompt_embeds, of the empty prompt."""
        found = dict(self.encode_prompts(prompts))
        if "negative_prompt_embeds" in inspect.signature(type(self.pipe).__call__).parameters:
            found["negative_prompt_embeds"] = self.encode_prompts([""] * len(prompts))["prompt_embeds"]
        return found

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Tokens with their places on four axes; the time is σ."""
        embeds, (rows, columns), batch = prompts["prompt_embeds"], noisy.shape[-2:], len(noisy)
        one = torch.arange(1)
        texts = torch.cartesian_prod(one, one, one, torch.arange(embeds.shape[1]))
        places = torch.cartesian_prod(one, torch.arange(rows), torch.arange(columns), one)
        return {
            "hidden_states": noisy.flatten(2).transpose(1, 2),
            "timestep": (1000 * times).to(noisy.dtype) / 1000,
            "guidance": self.guidance(noisy),
            "encoder_hidden_states": embeds,
            "txt_ids": texts.to(noisy.device).expand(batch, -1, -1),
            "img_ids": places.to(noisy.device).expand(batch, -1, -1),
            "return_dict": False,
        }

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The tokens as patches."""
        tokens: Tensor = output[0]
        return tokens.transpose(1, 2).unflatten(2, noisy.shape[-2:])
