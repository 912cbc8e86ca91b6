"""The hook through which control encoders act: their features are added after the denoiser's first layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ether_diffusion.core.targets import root_of
from ether_diffusion.private import hooks_changed

if TYPE_CHECKING:
    from ether_diffusion.pipelines.control_encoder import ControlEncoder

BRANCHES = 3
"""Guidance repeats a batch at most so often: unconditional, conditional, and PAG's perturbed one."""

FIRST_LAYER = "conv_in"
"""Of UNets; of transformers the family says it."""


class Control:
    """All control encoders of one denoiser, and the hook through which they act.

    An encoder acts on every forward of the denoiser while it is active and enabled, and then there must be a condition:
    a denoiser that was trained with a control and gets none would draw something else without a word.

    Args:
        denoiser: the UNet or transformer.
        place: path of its first layer: a convolution, or a Linear that makes tokens of patches.

    Attributes:
        encoders: by the name of the adapter that they came with.
        active: names of those that act.
        enabled: whether any acts.
    """

    def __init__(self, denoiser: nn.Module, place: str) -> None:
        self.encoders: dict[str, ControlEncoder] = {}
        self.active: set[str] = set()
        self.enabled = True
        self._denoiser, self._place = denoiser, place
        self._given: dict[str, Tensor] = {}
        self._pictures: list[torch.Size] | None = None
        self._hooks = (
            denoiser.register_forward_pre_hook(self._look, with_kwargs=True),
            first_layer(denoiser, place).register_forward_hook(self._add),
        )

    def add(self, name: str, encoder: ControlEncoder) -> None:
        """Put an encoder on the denoiser; it is active.

        Raises:
            ValueError: its width is not that of the first layer, or the name is taken.
        """
        if name in self.encoders:
            raise ValueError(f"a control {name!r} is there already: unload it, or choose another name")
        made, width = encoder.config.out_channels, first_width(self._denoiser, self._place)
        if width != made:
            raise ValueError(f"the control encoder makes {made} channels, the denoiser's first layer has {width}")
        self.encoders[name] = encoder
        self.active.add(name)

    def remove(self, name: str) -> None:
        """Take an encoder off; the last one takes the hook with it."""
        del self.encoders[name]
        self.active.discard(name)
        if not self.encoders:
            self.leave()
            del self._denoiser.__dict__[_ATTRIBUTE]
            hooks_changed(self._denoiser)

    def leave(self) -> None:
        """Take the hooks off the denoiser."""
        for hook in self._hooks:
            hook.remove()

    def enable(self, enabled: bool = True) -> None:
        """Turn all encoders on or off, remembering which are active."""
        self.enabled = enabled

    @contextmanager
    def given(self, features: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context these features are added, by the name of their encoder; contexts may be nested.

        Args:
            features: (N, width, h, w) for each name, of :meth:`features`; N divides the denoiser's batch, over which
                they are repeated as a whole, so that the unconditional half of guidance sees them, too.
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

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the shapes of pictures that a denoiser takes as a list; it embeds the patches of all in one row."""
        first = args[0] if args else kwargs.get("x")
        self._pictures = [picture.shape for picture in first] if isinstance(first, list) else None

    def _add(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        if not self.enabled or not self.active:
            return None
        for name in sorted(self.active):
            output = output + self._fitting(name, output)
        return output

    def _fitting(self, name: str, like: Tensor) -> Tensor:
        """The features of a control, repeated to the denoiser's batch, as a grid or as tokens row by row."""
        if name not in self._given:
            raise RuntimeError(
                f"the control {name!r} has no condition: draw within `with ether.controlled(pipe, image):`, or with a "
                "StableDiffusionControlPipeline; ether.disable(pipe) draws without"
            )
        features = self._given[name]
        factor, sides = self.encoders[name].vae_factor, self._sides(like)
        count, batch = len(features), len(like) if like.dim() > 2 else len(self._pictures or ())
        if features[0, 0].numel() != like.shape[1] if sides is None else any(features.shape[2:] != s for s in sides):
            mine = " x ".join(str(factor * side) for side in features.shape[2:])
            theirs = "another number" if sides is None else " x ".join(str(factor * side) for side in sides[0])
            raise ValueError(
                f"the control image of {name!r} has {mine} pixels (height x width), the picture {theirs}: "
                "resize one of them"
            )
        if batch % count or (count > 1 and batch // count > BRANCHES):
            raise ValueError(
                f"{count} control images cannot be shared among a batch of {batch}: give one for each "
                "prompt, and num_images_per_prompt where there are several"
            )
        features = features.to(like.device, like.dtype)
        if like.dim() < 4:
            features = features.flatten(2).transpose(1, 2)
        if like.dim() == 2:  # a picture's tokens are followed by those that fill up its row
            filling = len(like) // batch - features.shape[1]
            return nn.functional.pad(features, (0, 0, 0, filling)).repeat(batch // count, 1, 1).flatten(0, 1)
        return features.repeat(batch // count, *[1] * (like.dim() - 1))

    def _sides(self, like: Tensor) -> list[tuple[int, ...]] | None:
        """Height and width of the features that fit each picture; None where only their number is known."""
        if like.dim() == 4:
            return [tuple(like.shape[2:])]
        if like.dim() == 3 or self._pictures is None:
            return None
        layer = first_layer(self._denoiser, self._place)
        assert isinstance(layer, nn.Linear), "patches are embedded by a Linear"
        patch = math.isqrt(layer.in_features // self._pictures[0][0])
        return [tuple(side // patch for side in shape[-2:]) for shape in self._pictures]


_ATTRIBUTE = "_ether_control"


def control_of(denoiser: nn.Module) -> Control | None:
    """The control encoders of a denoiser, None if there are none."""
    control: Control | None = root_of(denoiser).__dict__.get(_ATTRIBUTE)
    return control


def attach_control(
    denoiser: nn.Module, encoder: ControlEncoder, name: str = "default", place: str = FIRST_LAYER
) -> Control:
    """Let an encoder's features be added after the first layer of a denoiser.

    Args:
        denoiser: a UNet or transformer.
        encoder: makes the features.
        name: of the adapter that it belongs to.
        place: path of the first layer, as the model's family says it.

    Raises:
        ValueError: the widths differ, the name is taken, or the model has no such layer.
    """
    root = root_of(denoiser)
    control = control_of(denoiser) or Control(root, place)
    try:
        control.add(name, encoder)
    except ValueError:
        if not control.encoders:
            control.leave()
        raise
    root.__dict__[_ATTRIBUTE] = control
    hooks_changed(root)
    return control


def first_layer(denoiser: nn.Module, place: str = FIRST_LAYER) -> nn.Conv2d | nn.Linear:
    """The layer that a control is added after.

    Raises:
        ValueError: the model has no such layer.
    """
    root = root_of(denoiser)
    try:
        layer = root.get_submodule(place)
    except AttributeError:
        layer = None
    layer = getattr(layer, "base_layer", layer)  # a LoRA may be around it
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise ValueError(f"{type(root).__name__} has no first layer `{place}` that a control could be added after")
    return layer


def first_width(denoiser: nn.Module, place: str = FIRST_LAYER) -> int:
    """Channels of a denoiser's first layer.

    Raises:
        ValueError: the model has no such layer.
    """
    layer = first_layer(denoiser, place)
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
