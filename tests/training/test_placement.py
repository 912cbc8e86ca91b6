"""Text encoders and autoencoder are on the device only while they are needed, and not asked for anything later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from training.helpers import SMALL
from transformers import CLIPTextModel

from ether_diffusion.training.placement import home_of, present

META, CPU = torch.device("meta"), torch.device("cpu")


class Traveller(nn.Module):
    """Notes where it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.sent: list[torch.device] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.sent.append(args[0])
        self.weight = nn.Parameter(torch.ones(2, device=args[0]))  # nothing can be copied back from the meta device
        return self


def test_modules_come_and_go_whatever_happens() -> None:
    away, here, empty = Traveller(), Traveller().to(META), nn.Identity()

    def stop() -> None:
        assert home_of(away) == META
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), present(META, away, here, empty):
        stop()
    assert away.sent == [META, CPU]
    assert here.sent == [META], "what is there already stays"
    assert home_of(empty) is None


def test_frozen_text_encoders_are_not_asked_for_anything_once_training_has_begun(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the steps, nor for samples, nor for the loss on fixed pictures."""
    stepped, asked = False, 0
    forward, encode = UNet2DConditionModel.forward, CLIPTextModel.forward

    def step(unet: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal stepped
        stepped = stepped or unet.training
        return forward(unet, *args, **kwargs)

    def speak(encoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        assert not stepped, "a prompt is encoded after the first step"
        return encode(encoder, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", step)
    monkeypatch.setattr(CLIPTextModel, "forward", speak)
    run = train(**SMALL | {"resolution": None, "validation_steps": 2})
    assert asked > 0
    assert len(list((run / "samples").glob("step-*/*.png"))) == 3
