"""Sana: Gemma as text encoder with an instruction before the prompt, and an autoencoder that compresses 32 times."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.families.parts import statistics_misfit
from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.transformer import WITH_MASKS, FlowTransformer


class Sana(FlowTransformer):
    """Sana and Sana 1.5 (arXiv 2410.10629, 2501.18427)."""

    NAME = "sana"
    TITLE = "Sana"
    TIME = "1000 σ · timestep_scale"
    LATENTS = "z · scale"
    PIPELINES = ("SanaPipeline",)
    ENCODED = WITH_MASKS
    STEPS = 20
    GUIDANCE = 4.5
    LENGTH = 300

    def misfit(self) -> str | None:
        """A scheduler of another kind of noise, or latents that the pipeline would not shift."""
        return super().misfit() or statistics_misfit(self.pipe.vae)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent and side."""
        return 2 ** (len(self.pipe.vae.config.encoder_block_out_channels) - 1)

    @property
    def divisor(self) -> int:
        """Pixels of a patch."""
        return int(self.denoiser.config.patch_size) * self.vae_factor

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the pictures that the base was made for."""
        return int(self.denoiser.config.sample_size) * self.vae_factor

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder has no deviation."""
        vae = self.pipe.vae
        (latents,) = vae.encode(pixel_values.to(vae.device, vae.dtype), return_dict=False)
        return latents, torch.zeros_like(latents)

    @property
    def instruction(self) -> list[str]:
        """What the pipeline says before a prompt."""
        lines: list[str] = inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default
        return lines

    def said(self, prompt: str) -> str:
        """The instruction and the prompt in small letters."""
        (text,) = self.pipe._text_preprocessing(prompt)
        return "\n".join(self.instruction) + str(text)

    def limit(self, tokenizer: Any) -> int:
        """The instruction, and the tokens of prompts but two."""
        return len(tokenizer.encode("\n".join(self.instruction))) + int(self.max_sequence_length or 0) - 2

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, features) and their mask (batch, tokens), 1 where the prompt is."""
        embeds, mask, *_ = self.encode_text(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def encode_text(self, prompts: Sequence[str], **settings: Any) -> Any:
        """With the instruction that the pipeline puts before each prompt."""
        return super().encode_text(prompts, complex_human_instruction=self.instruction, **settings)

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        return self.zeros_with_mask(batch, self.length, self.denoiser.config.caption_channels)

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Latents as they are; the time is 1000 σ times a number of the base."""
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": prompts["prompt_embeds"],
            "encoder_attention_mask": prompts["prompt_attention_mask"],
            "timestep": 1000 * times * self.denoiser.config.timestep_scale,
            "return_dict": False,
        }

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The velocity, in the layout of the latents; beside it there may be a variance."""
        answer: Tensor = output[0]
        return answer[:, : noisy.shape[1]]

    def drawing(
        self, prompts: Sequence[str], guidance_scale: float, encoded: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Pictures of the size that is asked for."""
        return {**super().drawing(prompts, guidance_scale, encoded), "use_resolution_binning": False}
