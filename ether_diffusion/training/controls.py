"""The two ways of control: an encoder in front of the denoiser, or a ControlNet beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import ControlNetModel, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from ether_diffusion.control.pipeline import control_tensor, controlled
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import FAMILIES, family_of
from ether_diffusion.pipelines.control_encoder import ControlEncoder
from ether_diffusion.pipelines.control_hook import attach_control
from ether_diffusion.pipelines.file import first_line
from ether_diffusion.pipelines.schema import CONTROL
from ether_diffusion.training.base_model import BaseModelError
from ether_diffusion.training.sections import ControlSection
from ether_diffusion.training.trainables import ADAPTER_NAME, CONTROLNET_WEIGHTS, Components, Trainable


class EncoderControl:
    """A control encoder whose output is added after the denoiser's first layer; the method acts on the denoiser.

    Args:
        family: of the base.
        section: the settings.
    """

    def __init__(self, family: Family, section: ControlSection) -> None:
        self.family = family
        kind, place = "map" if section.has_maps else "image", family.CONTROL_PLACE
        if place is None:
            able = ", ".join(each.TITLE for each in FAMILIES.values() if each.CONTROL_PLACE is not None)
            raise BaseModelError(
                f"{family.TITLE} has no first layer that a control could be added after; controls are trained on {able}"
            )
        encoder = ControlEncoder.of(family.denoiser, family.divisor, kind, section.seed, place)
        thresholds = (section.canny_low, section.canny_high) if section.condition == "canny" else None
        encoder.config = replace(encoder.config, kind=section.condition, thresholds=thresholds)
        self.encoder = encoder.to(family.device)
        self.control = attach_control(family.denoiser, self.encoder, ADAPTER_NAME, place)

    def expects(self, classes: Sequence[str] | None) -> None:
        """Keep in the control's file which classes its maps have, where that is known."""
        known = None if classes is None else tuple(classes)
        self.encoder.config = replace(self.encoder.config, classes=known)

    @property
    def components(self) -> Components:
        """What the method acts on."""
        return {self.family.DENOISER: self.family.denoiser}

    @property
    def trainables(self) -> list[Trainable]:
        """What is trained besides the method's own."""
        return [Trainable(CONTROL, self.encoder, self.control.enable)]

    @contextmanager
    def training(self, arguments: dict[str, Any], conditions: Tensor) -> Iterator[dict[str, Any]]:
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
        family: of the base.
        section: the settings.

    Attributes:
        family: around a pipeline of diffusers with the ControlNet.

    Raises:
        BaseModelError: the ControlNet cannot be loaded, or does not fit the base.
    """

    def __init__(self, family: Family, section: ControlSection) -> None:
        if family.CONTROLNET is None:
            raise BaseModelError(f"no ControlNet of {family.TITLE} can be trained here: use --control encoder")
        self.section = section
        controlnet = _controlnet(family, section)
        self.controlnet = controlnet.to(family.device)
        own, expected = controlnet.config.cross_attention_dim, family.denoiser.config.cross_attention_dim
        if own != expected:
            raise BaseModelError(
                f"{section.controlnet_model_name_or_path} reads prompts of {own} features, the base makes {expected}: "
                "they are of different models"
            )
        pipe = family.with_controlnet(controlnet)
        pipe.register_to_config(_name_or_path=section.pretrained_model_name_or_path)
        self.family: Family = family_of(pipe, family.settings)

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
    def training(self, arguments: dict[str, Any], conditions: Tensor) -> Iterator[dict[str, Any]]:
        """Give the UNet the ControlNet's residuals."""
        own = self.controlnet.dtype
        down, mid = self.controlnet(
            arguments["sample"].to(own),
            arguments["timestep"],
            encoder_hidden_states=arguments["encoder_hidden_states"].to(own),
            controlnet_cond=conditions.to(own),
            added_cond_kwargs=arguments.get("added_cond_kwargs"),
            return_dict=False,
        )
        dtype = arguments["sample"].dtype
        yield {
            "down_block_additional_residuals": [each.to(dtype) for each in down],
            "mid_block_additional_residual": mid.to(dtype),
        }

    @contextmanager
    def drawing(self, pipe: DiffusionPipeline, conditions: list[Image.Image]) -> Iterator[dict[str, Any]]:
        """The argument of diffusers' own ControlNet pipelines."""
        yield {"image": control_tensor(conditions, self.family.vae_factor)}


def make_control(family: Family, section: ControlSection) -> EncoderControl | ControlNetControl:
    """The way that ``section.control`` names.

    Raises:
        BaseModelError: the ControlNet cannot be loaded, or does not fit the base.
    """
    return EncoderControl(family, section) if section.control == "encoder" else ControlNetControl(family, section)


def _controlnet(family: Family, section: ControlSection) -> ControlNetModel:
    """The ControlNet that is named, or a new one; frozen, in fp32 where its weights are trained."""
    denoiser = family.denoiser
    dtype = denoiser.dtype if section.train_controlnet == "nothing" else torch.float32
    name = section.controlnet_model_name_or_path
    if name is None:
        stages = family.vae_factor.bit_length()
        channels = (*(16, 32, 96, 256), *[256] * stages)[:stages]
        make = partial(ControlNetModel.from_unet, denoiser, conditioning_embedding_out_channels=channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(section.seed)
            return make().to(dtype).requires_grad_(False)
    try:
        return ControlNetModel.from_pretrained(name, dtype=dtype).requires_grad_(False)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"the ControlNet {name} cannot be loaded: {first_line(error)}") from error
