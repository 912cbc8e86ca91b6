"""Stable Diffusion 1.x and 2.x: a UNet, a CLIP text encoder, DDPM noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ether_diffusion.families.diffusion import Diffusion, scheduler_misfit
from ether_diffusion.families.protocol import Family, Prompts
from ether_diffusion.families.settings import ObjectiveSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752)."""

    NAME = "sd"
    TITLE = "Stable Diffusion 1.x and 2.x"
    PIPELINES: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    DERIVED: ClassVar[tuple[str, ...]] = ("StableDiffusionControlNetPipeline", "StableDiffusionControlPipeline")
    DENOISER = "unet"
    OPTIONS = frozenset({"snr_gamma"})
    CONTROL_PLACE = "conv_in"
    SAMPLER = "DPMSolverMultistepScheduler"
    STEPS = 25
    GUIDANCE = 7.5
    UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
    CONTROLNET = "StableDiffusionControlNetPipeline"
    CONTROL: ClassVar[str | None] = "StableDiffusionControlPipeline"

    def misfit(self) -> str | None:
        """A scheduler of another kind of noise, or latents with statistics that nothing here applies."""
        vae = self.pipe.vae.config
        if why := scheduler_misfit(self.pipe.scheduler):
            return why
        if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
            return "its latents are shifted and scaled by latents_mean and latents_std of its autoencoder"
        if vae.get("shift_factor"):
            return f"its latents are shifted by shift_factor={vae['shift_factor']} of its autoencoder"
        return None

    def objective(self, settings: ObjectiveSettings) -> Diffusion:
        """DDPM noise, as the base's scheduler has it."""
        from diffusers import DDPMScheduler

        return Diffusion(DDPMScheduler.from_config(self.pipe.scheduler.config), settings.snr_gamma)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.pipe.vae.config.latent_channels)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent and side."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the pictures that the base was made for."""
        return int(self.pipe.unet.config.sample_size) * self.vae_factor

    def scaled(self, encoded: Tensor) -> Tensor:
        """Times the autoencoder's scaling factor."""
        return encoded.float() * self.pipe.vae.config.scaling_factor

    def unscaled(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """By the autoencoder's scaling factor."""
        return drawn.to(self.pipe.vae.dtype) / self.pipe.vae.config.scaling_factor

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, features)."""
        embeds, _ = self.pipe.encode_prompt(list(prompts), self.text_device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def encode_for_drawing(self, prompts: Sequence[str]) -> dict[str, Any]:
        """prompt_embeds and negative_prompt_embeds."""
        embeds, negative = self.pipe.encode_prompt(
            list(prompts), self.text_device, 1, True, negative_prompt=[""] * len(prompts)
        )
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}

    def prompt_key(self, prompt: str) -> dict[str, Any]:
        """Token ids, padded and cut as the encoders see them."""
        tokens = [
            t(prompt, padding="max_length", max_length=t.model_max_length, truncation=True).input_ids
            for t in self.tokenizers.values()
        ]
        return {"tokens": tokens}

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """sample, timestep and encoder_hidden_states."""
        return {"sample": noisy, "timestep": times, "encoder_hidden_states": prompts["prompt_embeds"]}

    def with_controlnet(self, controlnet: nn.Module) -> DiffusionPipeline:
        """diffusers' StableDiffusionControlNetPipeline."""
        from diffusers import StableDiffusionControlNetPipeline

        return StableDiffusionControlNetPipeline(
            **self.pipe.components, controlnet=controlnet, requires_safety_checker=False
        )

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The UNet's sample."""
        sample: Tensor = output.sample
        return sample
