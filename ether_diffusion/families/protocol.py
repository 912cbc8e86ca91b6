"""What a family of base models answers: prompts, latents, noise, the call of the denoiser, and what its parts are."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ether_diffusion.families.lora_names import TRANSFORMER, Formats, formats
from ether_diffusion.families.original import Place, Table, original_place
from ether_diffusion.families.settings import FamilySettings, ObjectiveSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

Prompts = dict[str, Any]
"""Encoded prompts of a batch, under names of the family's own."""

CLIP_LENGTH = 77
"""Tokens that CLIP's text encoders see, whatever the length for others."""


class Levels(Protocol):
    """How much noise samples get; small, for the processes that load pictures have a copy."""

    def draw(self, random: torch.Generator) -> Tensor:
        """A sample's level, a scalar; the first draw from ``random``."""

    def spread(self, number: int) -> Tensor:
        """Levels (number,) spread evenly over all: what the loss is compared at."""


class Objective(Protocol):
    """How noise is mixed in, what is predicted, and how a sample is weighted."""

    @property
    def levels(self) -> Levels:
        """How much noise samples get."""

    def times(self, levels: Tensor, size: tuple[int, int]) -> Tensor:
        """The times of levels, for latents of ``size`` (height, width)."""

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noisy latents; ``latents`` and ``noise`` (batch, channels, h, w), ``times`` (batch,)."""

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser is to answer."""

    def losses(self, prediction: Tensor, target: Tensor, times: Tensor) -> Tensor:
        """Weighted mean squared error of every sample, (batch,) in fp32."""


class Family(ABC):
    """A family of base models, around one pipeline of it.

    Latents are what noise is added to: scaled, and of FLUX.2 packed to patches, always (batch, channels, h, w).

    Args:
        pipe: the base, or a pipeline with the same components.
        settings: what the run chooses.
    """

    NAME: ClassVar[str]
    """In files."""
    TITLE: ClassVar[str]
    """For people."""
    OBJECTIVE: ClassVar[str]
    """The noise it was trained on, for people."""
    TIME: ClassVar[str]
    """What the denoiser is told as time, for people."""
    LATENTS: ClassVar[str]
    """How latents come from the z of the autoencoder, for people."""
    TAG: ClassVar[str | None] = None
    """Of its models on the Hub, where people look for them; the name where there is none."""
    PIPELINES: ClassVar[tuple[str, ...]]
    """Pipelines of diffusers that can be trained."""
    DERIVED: ClassVar[tuple[str, ...]] = ()
    """Pipelines with the same components and one more use of them, that can be drawn with."""
    DENOISER: ClassVar[str] = "transformer"
    """The component that denoises."""
    TEXT_ENCODERS: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    """Components that encode prompts, and the tokenizer of each."""
    SINGLE_FILE_TEXT: ClassVar[Mapping[str, str]] = {}
    """What the names of each text encoder begin with in a base of one file, where there are such with encoders."""
    OPTIONS: ClassVar[frozenset[str]] = frozenset()
    """Settings of a run that not every family has, and this one has."""
    TOKEN_KEYS: ClassVar[Mapping[str, str]] = {}
    """From the text encoders that learn a placeholder token to the keys of their embeddings in a file, "" for the token
    itself; empty where no token can be trained."""
    UNUSED: ClassVar[tuple[str, ...]] = ()
    """Components that training does not need."""
    CONTROLNET: ClassVar[str | None] = None
    """Pipeline of diffusers with a ControlNet beside the denoiser, None where none can be trained here."""
    CONTROL: ClassVar[str | None] = None
    """Pipeline of this library that takes a control image beside the prompt."""
    CONTROL_PLACE: ClassVar[str | None] = None
    """Path of the denoiser's first layer, after which a control is added; None where no single layer makes the grid."""
    PER_SAMPLE: ClassVar[str | None] = None
    """Why samples of a batch cannot have adapters of their own, None where they can."""
    CHECKPOINTING: ClassVar[str | None] = None
    """Why gradient checkpointing would change what the denoiser answers, None where it does not."""
    CONTROL_TARGETS: ClassVar[str] = "attention+mlp"
    """What the method acts on in a training with a control, unless it is told otherwise."""
    LORA_FORMATS: ClassVar[Formats] = formats(TRANSFORMER)
    """Formats of LoRA files whose readers know it."""
    READ_BY_DIFFUSERS: ClassVar[tuple[str, ...]] = ("diffusers",)
    """Formats of LoRA files that diffusers' own loader takes."""
    ORIGINAL: ClassVar[Table] = {}
    """Layers of the authors' own code, where a LoRA file can have its names: the format original."""
    ORIGINAL_IN_COMFYUI: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the denoiser's layers that ComfyUI knows by those names only."""
    LORA_METADATA: ClassVar[Mapping[str, str]] = {}
    """How headers of its LoRA files name it."""
    SAMPLER: ClassVar[str] = "base"
    """Scheduler of diffusers for sample grids, base for the base's own."""
    STEPS: ClassVar[int]
    """Denoising steps of pictures."""
    GUIDANCE: ClassVar[float]
    """Guidance of pictures."""
    GUIDANCE_TRAINING: ClassVar[float] = 3.5
    """Guidance that a distilled denoiser is told in training: the default of diffusers' scripts for FLUX."""
    LENGTH: ClassVar[int | None] = None
    """Tokens that the pipeline cuts and pads prompts to, None where the tokenizer says it."""

    def __init__(self, pipe: DiffusionPipeline, settings: FamilySettings | None = None) -> None:
        self.pipe = pipe
        self.settings = settings or FamilySettings()

    @property
    def denoiser(self) -> ModelMixin:
        """The module that denoises."""
        module: ModelMixin = getattr(self.pipe, self.DENOISER)
        return module

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        device: torch.device = self.denoiser.device
        return device

    @property
    def text_device(self) -> torch.device:
        """Where prompts are encoded: the first text encoder's device."""
        return next((next(encoder.parameters()).device for encoder in self.text_encoders.values()), self.device)

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders that this base has, by component."""
        found = {name: getattr(self.pipe, name, None) for name in self.TEXT_ENCODERS}
        return {name: module for name, module in found.items() if module is not None}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers that this base has, by the component of their encoder."""
        found = {encoder: getattr(self.pipe, name, None) for encoder, name in self.TEXT_ENCODERS.items()}
        # of a processor its tokenizer
        return {name: getattr(each, "tokenizer", each) for name, each in found.items() if each is not None}

    @property
    def components(self) -> tuple[str, ...]:
        """The denoiser and the text encoders, by component."""
        return (self.DENOISER, *self.text_encoders)

    # the base

    @abstractmethod
    def misfit(self) -> str | None:
        """Why this base cannot be trained, such as another scheduler than the family's; None where it can."""

    @property
    def distilled(self) -> str | None:
        """By what one sees that the base was distilled to few steps, which training undoes; None where it was not."""
        return None

    @abstractmethod
    def objective(self, settings: ObjectiveSettings) -> Objective:
        """How noise is mixed in, and what is predicted."""

    # pictures

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.pipe.vae.config.latent_channels)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent and side."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def divisor(self) -> int:
        """Sides of pictures are multiples of it."""
        return self.vae_factor

    @property
    @abstractmethod
    def native_resolution(self) -> int:
        """Side in pixels of the pictures that the base was made for."""

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's latents, in the layout of latents but not scaled.

        Args:
            pixel_values: (batch, 3, H, W) in [-1, 1].
        """
        vae = self.pipe.vae
        posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    @abstractmethod
    def scaled(self, encoded: Tensor) -> Tensor:
        """Latents from those that :meth:`encode` describes, fp32."""

    @abstractmethod
    def unscaled(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """What the autoencoder decodes, from what the pipeline gives with ``output_type="latent"``, fp32.

        Args:
            drawn: of the pipeline.
            height: of the pictures in pixels.
            width: likewise.
        """

    def decode(self, encoded: Tensor) -> Tensor:
        """Pictures (batch, 3, H, W) in [-1, 1] of what the autoencoder made, one at a time to save memory."""
        vae = self.pipe.vae
        return torch.cat([vae.decode(each, return_dict=False)[0] for each in encoded.to(vae.dtype).split(1)])

    # prompts

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """Prompts as the pipeline itself encodes them, with gradients where they are enabled; a batch."""

    DRAWS_ENCODED: ClassVar[bool] = True
    """Whether the pipeline draws with encoded prompts, so that its text encoders may be away."""

    @abstractmethod
    def encode_for_drawing(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Arguments of the pipeline that stand for prompts, and for what guidance leads away from; each a batch.

        The prompts themselves, where the pipeline does not draw with encoded ones.
        """

    def batch_for_drawing(self, encoded: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Several of :meth:`encode_for_drawing`, side by side."""
        return {key: _joined([each[key] for each in encoded]) for key in encoded[0]}

    @abstractmethod
    def blank_prompts(self, batch: int) -> Prompts:
        """Zeros of the shapes that :meth:`encode_prompts` gives for the longest prompts, without any text encoder."""

    def zeros(self, *shape: int) -> Tensor:
        """Zeros on the denoiser's device and in its dtype."""
        return torch.zeros(shape, device=self.device, dtype=self.denoiser.dtype)

    def zeros_with_mask(self, batch: int, tokens: int, features: int) -> Prompts:
        """Zeros as prompt_embeds (batch, tokens, features), and a mask of ones, int64."""
        embeds = self.zeros(batch, tokens, features)
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones_like(embeds[..., 0], dtype=torch.long)}

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        """One prompt, without the batch dimension."""
        return {key: value[0].contiguous() for key, value in self.encode_prompts([prompt]).items()}

    def batch_prompts(self, encoded: Sequence[Mapping[str, Tensor]]) -> Prompts:
        """A batch of what :meth:`encode_prompt` gave, the same as :meth:`encode_prompts` gives of all together."""
        return {key: torch.stack([each[key] for each in encoded]) for key in encoded[0]}

    def placed(self, prompts: Prompts, device: torch.device, dtype: torch.dtype) -> Prompts:
        """Encoded prompts on the denoiser's device, numbers in its dtype."""

        def place(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, dtype if value.is_floating_point() else None)
            return None if value is None else [place(each) for each in value]

        return {key: place(value) for key, value in prompts.items()}

    @property
    def max_sequence_length(self) -> int | None:
        """Tokens that prompts are cut and padded to, None where the tokenizer says it."""
        return self.settings.max_sequence_length or self.LENGTH

    def said(self, prompt: str) -> str:
        """What the tokenizers see of a prompt, where the pipeline adds to it or cleans it.

        With all tokens of a placeholder of several vectors, where the family can have one.
        """
        if not self.TOKEN_KEYS:
            return prompt
        tokenizer = self.tokenizers[next(iter(self.TOKEN_KEYS))]
        converted: str = self.pipe.maybe_convert_prompt(prompt, tokenizer)
        return converted

    def limit(self, tokenizer: Any) -> int:
        """Tokens that an encoder sees of what is said."""
        own = int(tokenizer.model_max_length)
        return own if own == CLIP_LENGTH else self.max_sequence_length or own

    def chunks_needed(self, prompts: Sequence[str]) -> int:
        """Chunks that hold the longest prompt; 1 of families that encode a prompt in one piece."""
        return 1

    def prompt_key(self, prompt: str) -> dict[str, Any]:
        """JSON of what the embeddings of a prompt depend on, beside the encoders."""
        tokens = [list(tokenizer(self.said(prompt), verbose=False).input_ids) for tokenizer in self.tokenizers.values()]
        return {"tokens": tokens, "length": self.max_sequence_length}

    def cut(self, prompt: str) -> dict[str, str]:
        """What an encoder does not see of a prompt, by component; nothing where all see all of it."""
        said, found = self.said(prompt), {}
        for encoder, tokenizer in self.tokenizers.items():
            ids, limit = list(tokenizer(said, verbose=False).input_ids), self.limit(tokenizer)
            if len(ids) > limit:
                kept = list(tokenizer(said, truncation=True, max_length=limit).input_ids)
                start = next(
                    (at for at, (one, other) in enumerate(zip(ids, kept, strict=False)) if one != other), limit
                )
                found[encoder] = str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()
        return found

    def lora_stem(self, component: str, path: str, kind: str) -> str | None:
        """What the keys of a layer begin with in a LoRA file, before ``.lora_A.weight`` or ``.lora_down.weight``.

        Args:
            component: of the pipeline.
            path: of the layer in it, canonical.
            kind: one of ``LORA_FORMATS``.

        Returns:
            None where the readers of that format know no such layer.
        """
        prefix = self.LORA_FORMATS[kind].get(component)
        if prefix is None:
            return None
        ours = component != self.DENOISER or not path.startswith(self.ORIGINAL_IN_COMFYUI)
        if kind == "comfyui" and not ours:
            return self.lora_stem(component, path, "original")
        if kind == "original":
            place = self.original_place(path)
            return None if place is None else prefix + place.name
        return prefix + (path if prefix.endswith(".") else path.replace(".", "_"))

    def original_place(self, path: str) -> Place | None:
        """Where a layer of the denoiser is in the code of the model's authors; None where that is not known."""
        return original_place(self.ORIGINAL, self.denoiser, path)

    @property
    def lora_metadata(self) -> dict[str, str]:
        """What the header of a LoRA file says of the base."""
        return dict(self.LORA_METADATA)

    # the denoiser

    @abstractmethod
    def arguments(self, noisy: Tensor, times: Tensor, prompts: Prompts, sizes: Tensor) -> dict[str, Any]:
        """The arguments of the denoiser's forward, those that the pipeline itself would give.

        Args:
            noisy: (batch, channels, h, w) in the denoiser's dtype.
            times: (batch,) of the objective.
            prompts: encoded, in the denoiser's dtype.
            sizes: (batch, 6) fp32: original size, crop corner, target size, which SDXL is told.
        """

    @abstractmethod
    def prediction(self, output: Any, noisy: Tensor) -> Tensor:
        """What the objective compares with its target, (batch, channels, h, w), from the denoiser's output."""

    def with_controlnet(self, controlnet: nn.Module) -> DiffusionPipeline:
        """A pipeline of diffusers over the same components, with a ControlNet beside the denoiser.

        Raises:
            ValueError: the family has none that can be trained here.
        """
        raise ValueError(f"{self.TITLE} has no ControlNet that can be trained here")

    def drawing(
        self, prompts: Sequence[str], guidance_scale: float, encoded: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Arguments of the pipeline for pictures of prompts with that guidance.

        Args:
            prompts: one for each picture.
            guidance_scale: as the pipeline counts it.
            encoded: :meth:`encode_for_drawing` of the prompts, where the text encoders are away.
        """
        if encoded is None:
            return {"guidance_scale": guidance_scale, "prompt": list(prompts)}
        # "" is the default of some, which would stand beside the encoded one
        own = inspect.signature(type(self.pipe).__call__).parameters
        absent = {name: None for name in own if name == "negative_prompt" and f"{name}_embeds" in encoded}
        return {"guidance_scale": guidance_scale, **absent, **encoded}


def _joined(values: Sequence[Any]) -> Any:
    """Batches one after another: tensors padded with zeros to the longest along their second dimension, lists, None."""
    if values[0] is None:
        return None
    if isinstance(values[0], Tensor):
        return pad_sequence([row for value in values for row in value], batch_first=True)
    return [row for value in values for row in value]
