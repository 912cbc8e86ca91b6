"""PixArt-Σ: a transformer with DDPM noise, T5 as text encoder, and a learned variance beside the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ether_diffusion.families.ddpm import DiffusionFamily
from ether_diffusion.families.lora_names import TRANSFORMER, Formats
from ether_diffusion.families.protocol import Prompts


class PixArtSigma(DiffusionFamily):
    """PixArt-Σ (arXiv 2403.04692)."""

    NAME = "pixart_sigma"
    TITLE = "PixArt-Σ"
    PIPELINES = ("PixArtSigmaPipeline",)
    DENOISER = "transformer"
    OPTIONS = DiffusionFamily.OPTIONS | {"max_sequence_length"}
    STEPS = 20
    GUIDANCE = 4.5
    LENGTH = 300
    READ_BY_DIFFUSERS = ()
    LORA_FORMATS: ClassVar[Formats] = {"comfyui": TRANSFORMER}

    @property
    def divisor(self) -> int:
        """Pixels of a patch."""
        return int(self.denoiser.config.patch_size) * self.vae_factor

    @property
    def cleans(self) -> bool:
        """Whether prompts are cleaned: the pipeline does it where both libraries for it are installed."""
        from diffusers.utils import is_bs4_available, is_ftfy_available

        return bool(is_bs4_available() and is_ftfy_available())

    def said(self, prompt: str) -> str:
        """The prompt in small letters, cleaned as in drawing."""
        (text,) = self.pipe._text_preprocessing(prompt, clean_caption=self.cleans)
        return str(text)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, features) and their mask (batch, tokens), 1 where the prompt is."""
        embeds, mask, *_ = self._encode(prompts, False)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def encode_for_drawing(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Embeddings and masks, of the prompts and of the empty prompt."""
        embeds, mask, negative, negative_mask = self._encode(prompts, True)
        return {
            "prompt_embeds": embeds,
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": negative,
            "negative_prompt_attention_mask": negative_mask,
        }

    def _encode(self, prompts: Sequence[str], guided: bool) -> Any:
        return self.pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=guided,
            device=self.text_device,
            clean_caption=self.cleans,
            max_sequence_length=self.max_sequence_length,
        )

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        return self.zeros_with_mask(batch, int(self.max_sequence_length or 0), self.denoiser.config.caption_channels)

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Latents as they are, the timestep, and the prompt with its mask."""
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": prompts["prompt_embeds"],
            "encoder_attention_mask": prompts["prompt_attention_mask"],
            "timestep": times,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The noise: the first half of the channels, where the second is the variance."""
        answer: Tensor = output[0]
        return answer[:, : noisy.shape[1]]

    def drawing(
        self, prompts: Sequence[str], guidance_scale: float, encoded: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Pictures of the size that is asked for, and prompts as in training."""
        return {
            **super().drawing(prompts, guidance_scale, encoded),
            "clean_caption": self.cleans,
            "max_sequence_length": self.max_sequence_length,
            "use_resolution_binning": False,
        }
