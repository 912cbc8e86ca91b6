"""The hook through which control encoders act: their features are added after the UNet's first convolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ether_diffusion.core.targets import root_of
from ether_diffusion.private import hooks_changed

if TYPE_CHECKING:
    from ether_diffusion.pipelines.control_encoder import ControlEncoder

BRANCHES = 3
"""Guidance repeats a batch at most so often: unconditional, conditional, and PAG's perturbed one."""


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
        self._hook = first_layer(unet).register_forward_hook(self._add)

    def add(self, name: str, encoder: ControlEncoder) -> None:
        """Put an encoder on the UNet; it is active.

        Raises:
            ValueError: its width is not that of the UNet, or the name is taken.
        """
        if name in self.encoders:
            raise ValueError(f"a control {name!r} is there already: unload it, or choose another name")
        if (width := first_width(self._unet)) != encoder.config.out_channels:
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
            hooks_changed(self._unet)

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
    hooks_changed(root)
    return control


def first_layer(unet: nn.Module) -> nn.Conv2d:
    """The layer that a control is added after.

    Raises:
        ValueError: the model has no ``conv_in``.
    """
    convolution = getattr(root_of(unet), "conv_in", None)
    if not isinstance(convolution, nn.Conv2d):
        raise ValueError(f"{type(unet).__name__} has no first convolution `conv_in` for a control: a UNet is needed")
    return convolution


def first_width(unet: nn.Module) -> int:
    """Channels of a UNet's first convolution.

    Raises:
        ValueError: the model has no ``conv_in``.
    """
    return first_layer(unet).out_channels
