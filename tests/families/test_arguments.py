"""Training calls the denoiser as the stock pipeline does: the same arguments, key by key, and the same prompts."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import DIFFUSION, FLOW, build

from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.settings import FamilySettings

PROMPTS = ["a red dog", "two blue cats on a beach"]
SIZE = (32, 48)


class Recorder:
    """Stands for a denoiser's forward: keeps the arguments of every call, and answers noise."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.forward, self.signature = denoiser.forward, inspect.signature(denoiser.forward)
        self.calls: list[dict[str, Any]] = []
        denoiser.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(*args, **kwargs)
        self.calls.append({key: value for key, value in given.arguments.items() if key != "return_dict"})
        return self.forward(*args, **kwargs)


def recorded(pipe: DiffusionPipeline, family: Family, size: tuple[int, int]) -> list[dict[str, Any]]:
    """The arguments of each step of a drawing without guidance by a second branch."""
    recorder = Recorder(family.denoiser)
    pipe(
        height=size[0],
        width=size[1],
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **family.drawing(PROMPTS, 0.0 if family.NAME == "z_image" else 1.0),
    )
    family.denoiser.forward = recorder.forward
    return recorder.calls


def present(arguments: dict[str, Any]) -> dict[str, Any]:
    """Without what is None or empty, which is the same as not given."""
    return {key: value for key, value in arguments.items() if value is not None and value != {}}


def same(ours: Any, theirs: Any) -> None:
    """Equal in kind, shape, dtype and value."""
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            same(ours[key], value)
    elif isinstance(theirs, list | tuple) and theirs and isinstance(theirs[0], torch.Tensor):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", [*FLOW, *DIFFUSION])
@torch.no_grad()
def test_every_argument_is_the_pipelines(name: str) -> None:
    pipe = build(name)
    # guidance as an input is told 1.0 in the drawing above
    family = family_of(pipe, FamilySettings(guidance_scale_training=1.0))
    size = (64, 64) if name in DIFFUSION else SIZE
    calls = recorded(pipe, family, size)
    assert len(calls) == 3
    prompts = family.encode_prompts(PROMPTS)
    sizes = torch.tensor([*size, 0, 0, *size], dtype=torch.float32).expand(2, 6)
    for call in calls:
        noisy, times = told(name, call, family, size)
        ours = inspect.signature(family.denoiser.forward).bind(**family.arguments(noisy, times, prompts, sizes))
        mine, theirs = present(ours.arguments), present(call)
        mine.pop("return_dict", None)
        if name in DIFFUSION:
            theirs["timestep"] = theirs["timestep"].expand(2)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            same(mine[key], value)


def told(name: str, call: dict[str, Any], family: Family, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and times of a recorded call."""
    height, width = (side // family.vae_factor for side in size)
    if name in DIFFUSION:
        return call["sample"], call["timestep"].expand(2)
    if name == "z_image":
        return torch.stack(call["x"]).squeeze(2), 1 - call["t"]
    latents, times = call["hidden_states"], call["timestep"]
    if name.startswith("sd3"):
        return latents, times / 1000
    if name == "flux2":
        return latents.transpose(1, 2).unflatten(2, (height, width)), times
    return family.pipe._unpack_latents(latents, *size, family.pipe.vae_scale_factor).reshape(
        2, -1, height, width
    ), times


@pytest.mark.parametrize("name", [*FLOW, *DIFFUSION])
@torch.no_grad()
def test_prompts_one_by_one_are_those_of_a_batch(name: str) -> None:
    family = family_of(build(name))
    together = family.encode_prompts(PROMPTS)
    alone = family.batch_prompts([family.encode_prompt(prompt) for prompt in PROMPTS])
    assert alone.keys() == together.keys()
    for key, value in together.items():
        same(alone[key], value)
    assert len({str(family.prompt_key(prompt)) for prompt in PROMPTS}) == 2


@pytest.mark.parametrize("name", [*FLOW, *DIFFUSION])
@torch.no_grad()
def test_encoded_prompts_draw_what_prompts_draw(name: str) -> None:
    """Several that were encoded one by one, and a pipeline without its text encoders."""
    pipe = build(name)
    family = family_of(pipe)
    asked = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}
    dice = lambda: [torch.Generator().manual_seed(seed) for seed in (0, 1)]  # noqa: E731
    guidance = 2.0
    expected = pipe(**family.drawing(PROMPTS, guidance), **asked, generator=dice()).images
    encoded = family.batch_for_drawing([family.encode_for_drawing([prompt]) for prompt in PROMPTS])
    for encoder in family.text_encoders:
        setattr(pipe, encoder, None)
    drawn = pipe(**family.drawing(PROMPTS, guidance, encoded), **asked, generator=dice()).images
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
