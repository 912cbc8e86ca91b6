"""AuraFlow: a multilingual T5 as text encoder, latents of SDXL's autoencoder, no mask of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ether_diffusion.families.lora_names import TRANSFORMER, formats
from ether_diffusion.families.parts import statistics_misfit
from ether_diffusion.families.protocol import Prompts
from ether_diffusion.families.transformer import WITH_MASKS, FlowTransformer


class AuraFlow(FlowTransformer):
    """AuraFlow (fal 2024)."""

    NAME = "aura_flow"
    TITLE = "AuraFlow"
    LATENTS = "z · scale"
    PIPELINES = ("AuraFlowPipeline",)
    ENCODED = WITH_MASKS
    STEPS = 50
    GUIDANCE = 3.5
    LENGTH = 256
    LORA_FORMATS = formats(TRANSFORMER, TRANSFORMER)

    def misfit(self) -> str | None:
        """A scheduler of another kind of noise, or latents that the pipeline would not shift."""
        return super().misfit() or statistics_misfit(self.pipe.vae)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """prompt_embeds (batch, tokens, features), zeros after the prompt."""
        embeds, *_ = self.encode_text(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        return {"prompt_embeds": self.zeros(batch, self.length, self.denoiser.config.joint_attention_dim)}

    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """Latents as they are; the time is σ."""
        return {
            "hidden_states": noisy,
            "timestep": times.to(noisy.dtype),
            "encoder_hidden_states": prompts["prompt_embeds"],
            "return_dict": False,
        }

    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """The velocity, in the layout of the latents."""
        velocity: Tensor = output[0]
        return velocity
