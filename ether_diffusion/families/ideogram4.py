"""Ideogram 4: layers of Qwen3-VL as the prompt, one sequence of text and picture, a second transformer for guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ether_diffusion.families.flow import Size
from ether_diffusion.families.patch_latents import PatchLatents
from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.transformer import PATCH

BASE_RESOLUTION = 512
"""Side in pixels of the pictures whose σ the pipeline does not shift."""


class Ideogram4(PatchLatents):
    """Ideogram 4 (Ideogram 2026). The transformer of the branch without prompt is not trained."""

    NAME = "ideogram4"
    TITLE = "Ideogram 4"
    TIME = "1 - σ"
    PIPELINES = ("Ideogram4Pipeline",)
    DRAWS_ENCODED = False
    STEPS = 48
    GUIDANCE = 7.0
    LENGTH: ClassVar[int] = 2048

    @property
    def native_resolution(self) -> int:
        """2048 pixels, the pipeline's default."""
        return 2048

    def patched(self, latents: Tensor) -> Tensor:
        """Of each place the channels: the other order than FLUX.2's."""
        patches = F.pixel_unshuffle(latents, PATCH)
        return patches.unflatten(1, (-1, PATCH**2)).transpose(1, 2).flatten(1, 2)

    def shift(self) -> Callable[[Size], float]:
        """The pipeline draws at quantiles of a logit-normal; its mean is half the logarithm of the number of pixels.

        That is a shift by the side of the picture, beside the scheduler's own.
        """
        own, factor = super().shift(), self.vae_factor / BASE_RESOLUTION
        return lambda size: own(size) * factor * math.sqrt(size[0] * size[1])

    def unscaled(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """z from tokens."""
        mean, deviation = self.statistics(drawn.device)
        size = (height // self.vae_factor, width // self.vae_factor)
        patches = drawn.float().transpose(1, 2).unflatten(2, size) * deviation + mean
        return F.pixel_shuffle(patches.unflatten(1, (PATCH**2, -1)).transpose(1, 2).flatten(1, 2), PATCH)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds: of each prompt (its tokens, features), layers of the language model side by side."""
        length = self.length
        embeds, _, _, indicator = self.pipe.encode_prompt(list(prompts), 1, 1, length, self.text_device)
        said = indicator[:, :length].bool()
        return {"prompt_embeds": [own[:length][own_said] for own, own_said in zip(embeds, said, strict=True)]}

    def batch_prompts(self, encoded: Sequence[Mapping[str, Tensor]]) -> Prompts:
        """As a list, each of its own length."""
        return {"prompt_embeds": [each["prompt_embeds"] for each in encoded]}

    def encode_for_drawing(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The prompts themselves: the pipeline takes nothing else."""
        return {"prompt": list(prompts)}

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        width = self.denoiser.config.llm_features_dim
        return {"prompt_embeds": [self.zeros(self.length, width) for _ in range(batch)]}

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """One sequence: padding, the prompt, the picture; the time is 1 - σ."""
        embeds, (rows, columns), length = prompts["prompt_embeds"], noisy.shape[-2:], self.length
        places, segments, indicator = self.pipe._prepare_ids(
            [len(each) for each in embeds], rows, columns, length, noisy.device
        )
        texts = torch.stack([F.pad(each, (0, 0, length - len(each), rows * columns)) for each in embeds])
        return {
            "hidden_states": F.pad(noisy.flatten(2).transpose(1, 2), (0, 0, length, 0)),
            "timestep": (1 - times).to(noisy.dtype),
            "encoder_hidden_states": texts,
            "position_ids": places,
            "segment_ids": segments,
            "indicator": indicator,
            "return_dict": False,
        }

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The velocity is the negative of what is answered at the picture's tokens."""
        tokens: Tensor = output[0]
        return -super().prediction((tokens[:, -math.prod(noisy.shape[-2:]) :],), noisy)

    def drawing(
        self, prompts: Sequence[str], guidance_scale: float, encoded: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The same guidance at all steps, where the pipeline's default is less of it at the last three."""
        return {**super().drawing(prompts, guidance_scale, encoded), "guidance_schedule": None}
