"""The two ways of control: an encoder in front of the base UNet, or a ControlNet beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image
from torch import Tensor, nn

from ether_diffusion.control.pipeline import control_tensor, controlled
from ether_diffusion.pipelines.components import is_xl, vae_factor
from ether_diffusion.pipelines.control_encoder import ControlEncoder
from ether_diffusion.pipelines.control_hook import attach_control
from ether_diffusion.pipelines.file import first_line
from ether_diffusion.pipelines.schema import CONTROL
from ether_diffusion.training.base_model import BaseModelError
from ether_diffusion.training.conditioning import UNetInputs
from ether_diffusion.training.sections import ControlSection
from ether_diffusion.training.trainables import ADAPTER_NAME, CONTROLNET_WEIGHTS, Components, Trainable


class EncoderControl:
    """A control encoder whose output is added after the base UNet's first convolution; the method acts on the UNet.

    Args:
        pipe: the base.
        section: the settings.
    """

    def __init__(self, pipe: DiffusionPipeline, section: ControlSection) -> None:
        self.pipe = pipe
        kind = "map" if section.has_maps else "image"
        self.encoder = ControlEncoder.of(pipe.unet, vae_factor(pipe), kind, section.seed).to(pipe.unet.device)
        self.control = attach_control(pipe.unet, self.encoder, ADAPTER_NAME)

    @property
    def components(self) -> Components:
        """What the method acts on."""
        return {"unet": self.pipe.unet}

    @property
    def trainables(self) -> list[Trainable]:
        """What is trained besides the method's own."""
        return [Trainable(CONTROL, self.encoder, self.control.enable)]

    @contextmanager
    def training(self, inputs: UNetInputs, conditions: Tensor) -> Iterator[dict[str, Any]]:
        """Add the features of the conditions."""
        with self.control.given({ADAPTER_NAME: self.control.features(ADAPTER_NAME, conditions)}):
            yield {}

    @contextmanager
    def drawing(self, pipe: DiffusionPipeline, conditions: list[Image.Image]) -> Iterator[dict[str, Any]]:
        """As users draw: :func:`ether_diffusion.controlled`."""
        with controlled(pipe, conditions):
            yield {}


class ControlNetControl:
    """A ControlNet (arXiv 2302.05543) beside the frozen UNet; the method acts on the ControlNet.

    Args:
        pipe: the base.
        section: the settings.

    Attributes:
        pipe: a pipeline of diffusers with the ControlNet.

    Raises:
        BaseModelError: the ControlNet cannot be loaded, or does not fit the base.
    """

    def __init__(self, pipe: DiffusionPipeline, section: ControlSection) -> None:
        self.section = section
        controlnet = _controlnet(pipe, section)
        self.controlnet = controlnet.to(pipe.unet.device)
        if controlnet.config.cross_attention_dim != pipe.unet.config.cross_attention_dim:
            raise BaseModelError(
                f"{section.controlnet_model_name_or_path} reads prompts of {controlnet.config.cross_attention_dim} "
                f"features, the base makes {pipe.unet.config.cross_attention_dim}: they are of different models"
            )
        kind = StableDiffusionXLControlNetPipeline if is_xl(pipe) else StableDiffusionControlNetPipeline
        xl = {"force_zeros_for_empty_prompt": getattr(pipe.config, "force_zeros_for_empty_prompt", True)}
        more = xl if is_xl(pipe) else {"requires_safety_checker": False}
        self.pipe: DiffusionPipeline = kind(**pipe.components, controlnet=controlnet, **more)
        self.pipe.register_to_config(_name_or_path=section.pretrained_model_name_or_path)

    @property
    def components(self) -> Components:
        """What the method acts on."""
        return {"controlnet": self.controlnet}

    @property
    def trainables(self) -> list[Trainable]:
        """The ControlNet's own weights, as far as they are trained."""
        wanted = self.section.train_controlnet
        if wanted == "nothing":
            return []
        parts: list[nn.Module] = [self.controlnet]
        if wanted == "connections":
            net = self.controlnet
            parts = [net.controlnet_cond_embedding, net.controlnet_down_blocks, net.controlnet_mid_block]
        for part in parts:
            part.requires_grad_(True)
        return [Trainable(CONTROLNET_WEIGHTS, self.controlnet, None)]

    @contextmanager
    def training(self, inputs: UNetInputs, conditions: Tensor) -> Iterator[dict[str, Any]]:
        """Give the UNet the ControlNet's residuals."""
        down, mid = self.controlnet(
            inputs.sample.to(self.controlnet.dtype),
            inputs.timesteps,
            encoder_hidden_states=inputs.prompt_embeds.to(self.controlnet.dtype),
            controlnet_cond=conditions.to(self.controlnet.dtype),
            added_cond_kwargs=inputs.added,
            return_dict=False,
        )
        dtype = inputs.sample.dtype
        yield {
            "down_block_additional_residuals": [each.to(dtype) for each in down],
            "mid_block_additional_residual": mid.to(dtype),
        }

    @contextmanager
    def drawing(self, pipe: DiffusionPipeline, conditions: list[Image.Image]) -> Iterator[dict[str, Any]]:
        """The argument of diffusers' own ControlNet pipelines."""
        yield {"image": control_tensor(conditions, vae_factor(pipe))}


def make_control(pipe: DiffusionPipeline, section: ControlSection) -> EncoderControl | ControlNetControl:
    """The way that ``section.control`` names.

    Raises:
        BaseModelError: the ControlNet cannot be loaded, or does not fit the base.
    """
    return EncoderControl(pipe, section) if section.control == "encoder" else ControlNetControl(pipe, section)


def _controlnet(pipe: DiffusionPipeline, section: ControlSection) -> ControlNetModel:
    """The ControlNet that is named, or a new one; frozen, in fp32 where its weights are trained."""
    dtype = pipe.unet.dtype if section.train_controlnet == "nothing" else torch.float32
    name = section.controlnet_model_name_or_path
    if name is None:
        stages = vae_factor(pipe).bit_length()
        channels = (*(16, 32, 96, 256), *[256] * stages)[:stages]
        make = partial(ControlNetModel.from_unet, pipe.unet, conditioning_embedding_out_channels=channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(section.seed)
            return make().to(dtype).requires_grad_(False)
    try:
        return ControlNetModel.from_pretrained(name, dtype=dtype).requires_grad_(False)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"the ControlNet {name} cannot be loaded: {first_line(error)}") from error
