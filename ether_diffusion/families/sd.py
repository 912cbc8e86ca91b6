"""Stable Diffusion 1.x and 2.x: a UNet, a CLIP text encoder, DDPM noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ether_diffusion.families.clip_chunks import Chunks, chunks_needed, chunks_of, prompt_tokens, tokens_per_chunk
from ether_diffusion.families.ddpm import DiffusionFamily
from ether_diffusion.families.lora_names import CLIP, Formats, modelspec
from ether_diffusion.families.protocol import CLIP_LENGTH, Prompts
from ether_diffusion.private import input_device

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
    OPTIONS = DiffusionFamily.OPTIONS | {"prompt_chunks"}
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
        if self.settings.prompt_chunks > 1:
            return self.encode_in_chunks(prompts)
        embeds, _ = self.pipe.encode_prompt(list(prompts), self.text_device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def encode_for_drawing(self, prompts: Sequence[str], negative: Sequence[str] | None = None) -> dict[str, Any]:
        """prompt_embeds and negative_prompt_embeds; ``negative`` is empty prompts where it is not given."""
        if self.settings.prompt_chunks > 1:
            return self.guided_in_chunks(prompts, negative)
        empty = [""] * len(prompts)
        embeds, away = self.pipe.encode_prompt(
            list(prompts), self.text_device, 1, True, negative_prompt=empty if negative is None else list(negative)
        )
        return {"prompt_embeds": embeds, "negative_prompt_embeds": away}

    def encode_in_chunks(self, prompts: Sequence[str]) -> Prompts:
        """Prompts in as many chunks as the settings say; of what is not a sequence the first chunk's.

        An encoder sees one chunk of every prompt at a time: a batch has as many rows as there are prompts, so that
        adapters which differ by sample act on the right ones.
        """
        tokens = {name: self._chunks(prompts, tokenizer) for name, tokenizer in self.tokenizers.items()}
        parts = [
            self.encode_chunk({name: Chunks(own.ids[at], own.mask[at]) for name, own in tokens.items()})
            for at in range(self.settings.prompt_chunks)
        ]
        return {**parts[0], "prompt_embeds": torch.cat([part["prompt_embeds"] for part in parts], 1)}

    def encode_chunk(self, tokens: Mapping[str, Chunks]) -> Prompts:
        """prompt_embeds (batch, tokens, features) of one chunk, from ids and mask (batch, tokens) by encoder."""
        encoder, (ids, mask) = self.pipe.text_encoder, tokens["text_encoder"]
        device = input_device(encoder)
        masked = getattr(encoder.config, "use_attention_mask", None)
        embeds: Tensor = encoder(ids.to(device), attention_mask=mask.to(device) if masked else None)[0]
        return {"prompt_embeds": embeds.to(encoder.dtype)}

    def guided_in_chunks(self, prompts: Sequence[str], negative: Sequence[str] | None) -> dict[str, Any]:
        """Prompts and what guidance leads away from, both in the same number of chunks."""
        empty = [""] * len(prompts)
        away = self.encode_prompts(empty) if negative is None else self.encode_in_chunks(negative)
        return {**self.encode_in_chunks(prompts), **{f"negative_{key}": value for key, value in away.items()}}

    def chunks_needed(self, prompts: Sequence[str]) -> int:
        """Of the tokenizer that needs the most."""
        tokenizers = self.tokenizers.values()
        return max(chunks_needed(prompt_tokens(self.pipe, each, prompts), each) for each in tokenizers)

    def cut(self, prompt: str) -> dict[str, str]:
        """What no chunk of an encoder holds, by component."""
        found = {}
        for encoder, tokenizer in self.tokenizers.items():
            (tokens,) = prompt_tokens(self.pipe, tokenizer, [prompt])
            if rest := tokens[self.settings.prompt_chunks * tokens_per_chunk(tokenizer) :]:
                found[encoder] = str(tokenizer.decode(rest)).strip()
        return found

    def prompt_key(self, prompt: str) -> dict[str, Any]:
        """Token ids, padded and cut as the encoders see them; of several chunks one list for each."""
        if self.settings.prompt_chunks > 1:
            return {"tokens": [self._chunks([prompt], each).ids[:, 0].tolist() for each in self.tokenizers.values()]}
        tokens = [
            t(prompt, padding="max_length", max_length=t.model_max_length, truncation=True).input_ids
            for t in self.tokenizers.values()
        ]
        return {"tokens": tokens}

    def _chunks(self, prompts: Sequence[str], tokenizer: Any) -> Chunks:
        return chunks_of(prompt_tokens(self.pipe, tokenizer, prompts), tokenizer, self.settings.prompt_chunks)

    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the longest prompts' shapes."""
        length = CLIP_LENGTH * self.settings.prompt_chunks
        return {"prompt_embeds": self.zeros(batch, length, self.denoiser.config.cross_attention_dim)}

    @torch.no_grad()
    def drawing(
        self, prompts: Sequence[str], guidance_scale: float, encoded: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Prompts of several chunks are encoded here: the pipeline would cut them."""
        if encoded is None and self.settings.prompt_chunks > 1:
            encoded = self.encode_for_drawing(prompts)
        return super().drawing(prompts, guidance_scale, encoded)

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
