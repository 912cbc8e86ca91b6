"""What the families of flow transformers share: flow matching, a scaled and shifted autoencoder, 2 x 2 patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ether_diffusion.families.flow import FlowMatching, Sigmas, Size, scheduler_misfit, scheduler_shift, shift_by_tokens
from ether_diffusion.families.parts import channels_misfit
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.settings import ObjectiveSettings

PATCH = 2
"""Latents per side of a token."""

WITH_MASKS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
"""What ``encode_prompt`` of several pipelines gives."""


def to_tokens(latents: Tensor) -> Tensor:
    """Latents (batch, channels, h, w) as tokens (batch, h w / 4, 4 channels), each a patch of 2 x 2."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Back to latents of ``height`` and ``width``."""
    patches = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return F.pixel_shuffle(patches, PATCH)


def places(rows: int, columns: int) -> Tensor:
    """The place of each token, (rows · columns, 3): 0, row, column."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())


class FlowTransformer(Family):
    """A transformer trained by flow matching; families say how it is called and how prompts are encoded."""

    OBJECTIVE = "flow matching"
    TIME: ClassVar[str] = "σ"
    LATENTS: ClassVar[str] = "(z - shift) · scale"
    OPTIONS: ClassVar[frozenset[str]] = frozenset(
        {"weighting_scheme", "logit_mean", "logit_std", "mode_scale", "max_sequence_length"}
    )
    STEPS: ClassVar[int] = 28
    ENCODED: ClassVar[tuple[str | None, ...]] = ()
    """Arguments of the pipeline that the results of its ``encode_prompt`` are, in their order; None for others."""
    MAX_SHIFT: ClassVar[float] = 1.15
    """Of a scheduler that shifts by size and does not name it."""

    def misfit(self) -> str | None:
        """A scheduler of another kind of noise, or more input than latents."""
        channels = self.latent_channels
        return scheduler_misfit(self.pipe.scheduler) or channels_misfit(self.denoiser, channels, PATCH**2 * channels)

    def objective(self, settings: ObjectiveSettings) -> FlowMatching:
        """Flow matching with the base's own shift."""
        levels = Sigmas(settings.weighting_scheme, settings.logit_mean, settings.logit_std, settings.mode_scale)
        return FlowMatching(self.shift(), levels)

    def shift(self) -> Callable[[Size], float]:
        """From the size of latents to the shift of σ in drawing."""
        mu = self.log_shift()
        return scheduler_shift(self.pipe.scheduler, lambda size: mu(self.tokens_of(size)))

    def log_shift(self) -> Callable[[int], float]:
        """From the number of tokens to the logarithm of the shift, where the scheduler shifts by size."""
        return shift_by_tokens(self.pipe.scheduler, self.MAX_SHIFT)

    def tokens_of(self, size: Size) -> int:
        """Number of the denoiser's tokens for latents of ``size`` (height, width)."""
        return (size[0] // PATCH) * (size[1] // PATCH)

    @property
    def divisor(self) -> int:
        """Pixels of a patch."""
        return PATCH * self.vae_factor

    @property
    def native_resolution(self) -> int:
        """1024 pixels, or the pipeline's own default."""
        return int(getattr(self.pipe, "default_sample_size", 128)) * self.vae_factor

    def scaled(self, encoded: Tensor) -> Tensor:
        """(z - shift) · scale of the autoencoder."""
        config = self.pipe.vae.config
        return (encoded.float() - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def unscaled(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """z = latents / scale + shift."""
        config = self.pipe.vae.config
        return drawn.float() / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def unpacked(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Latents of pictures of that size in pixels from the pipeline's tokens."""
        return from_tokens(tokens, height // self.vae_factor, width // self.vae_factor)

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The transformer's tokens as latents."""
        tokens: Tensor = output[0]
        return from_tokens(tokens, *noisy.shape[-2:])

    def prompt_key(self, prompt: str) -> dict[str, Any]:
        """Beside tokens and length the chat template that a prompt is put into."""
        templates = [str(getattr(tokenizer, "chat_template", "")) for tokenizer in self.tokenizers.values()]
        return {**super().prompt_key(prompt), "templates": templates}

    def beginning(self, prompt: str, **settings: Any) -> str:
        """A prompt in the tokenizer's chat template, as far as the prompt itself goes.

        Args:
            prompt: what the user says.
            settings: of the template.
        """
        (tokenizer,) = self.tokenizers.values()
        message = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **settings))
        before, found, _ = text.rpartition(prompt)
        return before + found if prompt and found else text

    def encode_text(self, prompts: Sequence[str], **settings: Any) -> Any:
        """The pipeline's own ``encode_prompt`` at the length of this run."""
        return self.pipe.encode_prompt(
            prompt=list(prompts), device=self.text_device, max_sequence_length=self.max_sequence_length, **settings
        )

    @property
    def length(self) -> int:
        """Tokens that prompts are cut and padded to."""
        assert self.max_sequence_length is not None, "every flow transformer has a length"
        return self.max_sequence_length

    def encode_for_drawing(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What the pipeline's ``encode_prompt`` gives with guidance, under the names of :attr:`ENCODED`."""
        found = self.encode_text(prompts, do_classifier_free_guidance=True)
        return {name: value for name, value in zip(self.ENCODED, found, strict=True) if name is not None}

    def drawing(
        self, prompts: Sequence[str], guidance_scale: float, encoded: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Guidance, and prompts of the length that training has."""
        length = {"max_sequence_length": self.max_sequence_length}
        return {**super().drawing(prompts, guidance_scale, encoded), **length}

    def guidance(self, noisy: Tensor) -> Tensor | None:
        """The guidance that a distilled transformer is told, (batch,) fp32; None where it takes none."""
        if not self.denoiser.config.guidance_embeds:
            return None
        told = self.settings.guidance_scale_training
        value = self.GUIDANCE_TRAINING if told is None else told
        return torch.full((len(noisy),), value, device=noisy.device, dtype=torch.float32)
