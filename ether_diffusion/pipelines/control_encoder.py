"""The control encoder: what a condition image adds after the denoiser's first layer (OFT, arXiv 2306.07280).

ControlNet (arXiv 2302.05543) copies half of the UNet. Here the UNet itself is finetuned by an adapter, and the
condition enters through one small encoder whose last convolution starts at zero: megabytes instead of gigabytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import nn

from ether_diffusion.pipelines.control_hook import FIRST_LAYER, first_width

CHANNELS = (16, 32, 96, 256)
"""Of the encoder's stages, each at half the side of the one before."""


@dataclass(frozen=True)
class ControlEncoderConfig:
    """The shape of a control encoder, as it is stored in the adapter file.

    Attributes:
        out_channels: the width of the denoiser's first layer: 320 for SD1.5.
        channels: of its stages; one more than the number of halvings from picture to latents.
        condition: "image", or "map": a semantic map, whose grey class ids are coloured as in training.
        kind: how the conditions of the training came to be, one of :data:`ether_diffusion.pipelines.schema.KINDS`;
            None of files of 0.1, which do not say it.
        classes: names of a map's classes by id, in whose colours of ``MAP_PALETTE`` it is; None where nobody knows.
        thresholds: lower and higher one of canny edges.
    """

    out_channels: int
    channels: tuple[int, ...] = CHANNELS
    condition: str = "image"
    kind: str | None = None
    classes: tuple[str, ...] | None = None
    thresholds: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able values, without those that are not known."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if value is not None
        }


class ControlEncoder(ControlNetConditioningEmbedding):
    """ControlNet's conditioning embedding: 3x3 convolutions with SiLU, the last one zero at the start.

    For SD1.5: 3→16→16→32→32→96→96→256→320, three of stride 2; 1,086,480 parameters.

    Args:
        config: its shape.
        seed: of the initial weights.
    """

    def __init__(self, config: ControlEncoderConfig, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(config.out_channels, 3, config.channels)
        self.config = config

    @classmethod
    def of(
        cls,
        denoiser: nn.Module,
        vae_factor: int,
        condition: str = "image",
        seed: int = 0,
        place: str = FIRST_LAYER,
    ) -> ControlEncoder:
        """A new encoder that fits a denoiser whose first layer, at ``place``, sees ``vae_factor`` pixels a side."""
        stages = vae_factor.bit_length()
        channels = (*CHANNELS, *[CHANNELS[-1]] * stages)[:stages]
        return cls(ControlEncoderConfig(first_width(denoiser, place), channels, condition), seed)

    @property
    def vae_factor(self) -> int:
        """Pixels per feature and side."""
        return 2 ** (len(self.config.channels) - 1)
