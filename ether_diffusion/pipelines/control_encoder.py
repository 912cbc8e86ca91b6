"""The control encoder: what a condition image adds after the UNet's first convolution (OFT, arXiv 2306.07280).

ControlNet (arXiv 2302.05543) copies half of the UNet. Here the UNet itself is finetuned by an adapter, and the
condition enters through one small encoder whose last convolution starts at zero: megabytes instead of gigabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn

from ether_diffusion.core.host import forget_compiled_code
from ether_diffusion.core.targets import root_of

CHANNELS = (16, 32, 96, 256)
"""Of the encoder's stages, each at half the side of the one before."""
BRANCHES = 3
"""Guidance repeats a batch at most so often: unconditional, conditional, and PAG's perturbed one."""


@dataclass(frozen=True)
class ControlEncoderConfig:
    """The shape of a control encoder, as it is stored in the adapter file.

    Attributes:
        out_channels: the UNet's first width: 320 for SD1.5.
        channels: of its stages; one more than the number of halvings from picture to latents.
        condition: "image", or "map": a semantic map, whose grey class ids are coloured as in training.
    """

    out_channels: int
    channels: tuple[int, ...] = CHANNELS
    condition: str = "image"

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able values."""
        return {**asdict(self), "channels": list(self.channels)}


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
    def of(cls, unet: nn.Module, vae_factor: int, condition: str = "image", seed: int = 0) -> ControlEncoder:
        """A new encoder that fits a UNet whose latents have ``vae_factor`` pixels a side."""
        stages = vae_factor.bit_length()
        channels = (*CHANNELS, *[CHANNELS[-1]] * stages)[:stages]
        return cls(ControlEncoderConfig(_first_width(unet), channels, condition), seed)

    @property
    def vae_factor(self) -> int:
        """Pixels per feature and side."""
        return 2 ** (len(self.config.channels) - 1)


class Control:
    """All control encoders of one UNet, and the hook through which they act.

    An encoder acts on every forward of the UNet while it is active and enabled, and then there must be a condition:
    a UNet that was trained with a control and gets none would draw something else without a word.

    Attributes:
        encoders: by the name of the adapter that they came with.
        active: names of those that act.
        enabled: whether any acts.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.encoders: dict[str, ControlEncoder] = {}
        self.active: set[str] = set()
        self.enabled = True
        self._unet = unet
        self._given: dict[str, Tensor] = {}
        self._hook = _first_convolution(unet).register_forward_hook(self._add)

    def add(self, name: str, encoder: ControlEncoder) -> None:
        """Put an encoder on the UNet; it is active.

        Raises:
            ValueError: its width is not that of the UNet, or the name is taken.
        """
        if name in self.encoders:
            raise ValueError(f"a control {name!r} is there already: unload it, or choose another name")
        if (width := _first_width(self._unet)) != encoder.config.out_channels:
            raise ValueError(f"the control encoder makes {encoder.config.out_channels} channels, the UNet has {width}")
        self.encoders[name] = encoder
        self.active.add(name)

    def remove(self, name: str) -> None:
        """Take an encoder off; the last one takes the hook with it."""
        del self.encoders[name]
        self.active.discard(name)
        if not self.encoders:
            self._hook.remove()
            del self._unet.__dict__[_ATTRIBUTE]
            forget_compiled_code()

    def enable(self, enabled: bool = True) -> None:
        """Turn all encoders on or off, remembering which are active."""
        self.enabled = enabled

    @contextmanager
    def given(self, features: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context these features are added, by the name of their encoder; contexts may be nested.

        Args:
            features: (N, width, h, w) for each name, of :meth:`features`; N divides the UNet's batch, over which they
                are repeated as a whole, so that the unconditional half of guidance sees them, too.
        """
        before = self._given
        self._given = before | dict(features)
        try:
            yield
        finally:
            self._given = before

    def features(self, name: str, condition: Tensor) -> Tensor:
        """What an encoder makes of a condition, (N, width, h, w); the encoder follows the condition's device.

        Args:
            name: of the encoder.
            condition: (N, 3, H, W) in [0, 1].

        Raises:
            ValueError: there is no such encoder.
        """
        if name not in self.encoders:
            raise ValueError(f"no control {name!r} is loaded; there are: {', '.join(self.encoders) or 'none'}")
        encoder = self.encoders[name]
        if next(encoder.parameters()).device != condition.device:
            encoder.to(condition.device)
        features: Tensor = encoder(condition.float())
        return features

    def _add(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        if not self.enabled or not self.active:
            return None
        for name in sorted(self.active):
            output = output + self._fitting(name, output)
        return output

    def _fitting(self, name: str, like: Tensor) -> Tensor:
        """The features of a control, repeated to the UNet's batch."""
        if name not in self._given:
            raise RuntimeError(
                f"the control {name!r} has no condition: draw within `with ether.controlled(pipe, image):`, or with a "
                "StableDiffusionControlPipeline; ether.disable(pipe) draws without"
            )
        features = self._given[name]
        count, batch, factor = len(features), len(like), self.encoders[name].vae_factor
        if features.shape[2:] != like.shape[2:]:
            mine, theirs = (" x ".join(str(factor * side) for side in x.shape[2:]) for x in (features, like))
            raise ValueError(
                f"the control image of {name!r} has {mine} pixels (height x width), the picture {theirs}: "
                "resize one of them"
            )
        if batch % count or (count > 1 and batch // count > BRANCHES):
            raise ValueError(
                f"{count} control images cannot be shared among a batch of {batch}: give one for each "
                "prompt, and num_images_per_prompt where there are several"
            )
        return features.to(like.device, like.dtype).repeat(batch // count, 1, 1, 1)


_ATTRIBUTE = "_ether_control"


def control_of(unet: nn.Module) -> Control | None:
    """The control encoders of a UNet, None if there are none."""
    control: Control | None = root_of(unet).__dict__.get(_ATTRIBUTE)
    return control


def attach_control(unet: nn.Module, encoder: ControlEncoder, name: str = "default") -> Control:
    """Let an encoder's features be added after the first convolution of a UNet.

    Raises:
        ValueError: the widths differ, the name is taken, or the model has no ``conv_in``.
    """
    root = root_of(unet)
    control = control_of(unet) or Control(root)
    try:
        control.add(name, encoder)
    except ValueError:
        if not control.encoders:
            control._hook.remove()
        raise
    root.__dict__[_ATTRIBUTE] = control
    forget_compiled_code()
    return control


def _first_convolution(unet: nn.Module) -> nn.Conv2d:
    convolution = getattr(unet, "conv_in", None)
    if not isinstance(convolution, nn.Conv2d):
        raise ValueError(f"{type(unet).__name__} has no first convolution `conv_in` for a control: a UNet is needed")
    return convolution


def _first_width(unet: nn.Module) -> int:
    return _first_convolution(root_of(unet)).out_channels
