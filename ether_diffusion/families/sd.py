"""Stable Diffusion 1.x and 2.x: a UNet, a CLIP text encoder, DDPM noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ether_diffusion.families.ddpm import DiffusionFamily
from ether_diffusion.families.lora_names import CLIP, Formats, modelspec
from ether_diffusion.families.protocol import CLIP_LENGTH, Prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
WIDTH_OF_V2 = 1024
"""Features of a token of Stable Diffusion 2."""


class StableDiffusion(DiffusionFamily):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752)."""

    NAME = "sd"
    TITLE = "Stable Diffusion 1.x and 2.x"
    TAG = "stable-diffusion"
    PIPELINES: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    DERIVED: ClassVar[tuple[str, ...]] = ("StableDiffusionControlNetPipeline", "StableDiffusionControlPipeline")
    DENOISER = "unet"
    SINGLE_FILE_TEXT: ClassVar[Mapping[str, str]] = {"text_encoder": "cond_stage_model."}
    TOKEN_KEYS: ClassVar[Mapping[str, str]] = {"text_encoder": ""}
    CONTROL_PLACE = "conv_in"
    CONTROL_TARGETS = "attention+geglu"  # the paper's
    SAMPLER = "DPMSolverMultistepScheduler"
    STEPS = 25
    GUIDANCE = 7.5
    UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
    CONTROLNET = "StableDiffusionControlNetPipeline"
    CONTROL: ClassVar[str | None] = "StableDiffusionControlPipeline"
    READ_BY_DIFFUSERS = ("diffusers", "kohya", "comfyui")
    LORA_FORMATS: ClassVar[Formats] = {"diffusers": {"unet": "unet.", **CLIP}, "kohya": KOHYA, "comfyui": KOHYA}
    LORA_METADATA = modelspec("stable-diffusion-v1", "diffusers", "sd_v1")

    def lora_stem(self, component: str, path: str, kind: str) -> str | None:
        """The paths of diffusers; kohya's scripts have no layers that tell times and sizes."""
        if kind == "kohya" and path.startswith(("time_embedding.", "add_embedding.")):
            return None
        return super().lora_stem(component, path, kind)

    @property
    def lora_metadata(self) -> dict[str, str]:
        """Of version 2 where prompts are as wide as its."""
        found = {"ss_v2": "False", **super().lora_metadata}
        if self.denoiser.config.cross_attention_dim == WIDTH_OF_V2:
            velocity = self.pipe.scheduler.config.get("prediction_type") == "v_prediction"
            version = f"stable-diffusion-v2-{'768-v' if velocity else '512'}"
            found |= {"ss_v2": "True", **modelspec(version, "diffusers", "sd_v2")}
        return found

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

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        return {"prompt_embeds": self.zeros(batch, CLIP_LENGTH, self.denoiser.config.cross_attention_dim)}

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
