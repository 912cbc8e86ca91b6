"""Training calls the denoiser as the stock pipeline does: the same arguments, key by key, and the same prompts."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import DIFFUSION, FLOW, build, drawn_size, family_in_test

from ether_diffusion.families.protocol import Family
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
        **family.drawing(PROMPTS, 0.0 if family.NAME in ("z_image", "krea2") else 1.0),
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
    family = family_in_test(pipe, guidance_scale_training=1.0)
    size = (64, 64) if name in DIFFUSION else drawn_size(family.pipe, SIZE)
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
        elif "solver" in name:  # it tells σ rounded down to whole thousandths
            key = "timesteps" if "timesteps" in theirs else "timestep"
            theirs[key] = theirs[key].float()
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            same(mine[key], value)


def told(name: str, call: dict[str, Any], family: Family, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and times of a recorded call."""
    height, width = (side // family.vae_factor for side in size)
    if name in DIFFUSION:
        return call["hidden_states" if "hidden_states" in call else "sample"], call["timestep"].expand(2)
    if name == "z_image":
        return torch.stack(call["x"]).squeeze(2), 1 - call["t"]
    latents, times = call["hidden_states"], call["timesteps" if "timesteps" in call else "timestep"]
    if name.startswith(("sd3", "hidream")):
        return latents, times / 1000
    if name.startswith("sana"):
        return latents, times / 500  # the tiny one's scale is a half
    if name == "lumina2":
        return latents, 1 - times
    if name == "ideogram4":
        return latents[:, family.max_sequence_length :].transpose(1, 2).unflatten(2, (height, width)), 1 - times
    if name == "flux2":
        return latents.transpose(1, 2).unflatten(2, (height, width)), times
    if latents.dim() == 4:
        return latents, times
    factor = () if name.startswith("krea2") else (family.pipe.vae_scale_factor,)
    return family.pipe._unpack_latents(latents, *size, *factor).reshape(2, -1, height, width), times


@pytest.mark.parametrize("name", [*FLOW, *DIFFUSION])
@torch.no_grad()
def test_prompts_one_by_one_are_those_of_a_batch(name: str) -> None:
    family = family_in_test(build(name))
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
    family = family_in_test(pipe)
    asked = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}
    dice = lambda: [torch.Generator().manual_seed(seed) for seed in (0, 1)]  # noqa: E731
    guidance = 2.0
    expected = pipe(**family.drawing(PROMPTS, guidance), **asked, generator=dice()).images
    encoded = family.batch_for_drawing([family.encode_for_drawing([prompt]) for prompt in PROMPTS])
    for encoder in family.text_encoders if family.DRAWS_ENCODED else ():
        setattr(pipe, encoder, None)
    drawn = pipe(**family.drawing(PROMPTS, guidance, encoded), **asked, generator=dice()).images
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


CHATTING = ("z_image", "flux2", "qwen_image")
"""Families that put a prompt into a template whose beginning counts."""


@pytest.mark.parametrize("name", ["chroma", "aura_flow", "sana", "lumina2", "krea2", "pixart_sigma", *CHATTING])
@torch.no_grad()
def test_what_is_cut_of_a_prompt_is_what_its_encoder_does_not_see(name: str) -> None:
    family = family_in_test(build(name))
    prompt = "abcdefghijklmnopqrstuvwxyz" * 25
    rest = family.cut(prompt)["text_encoder"]
    assert 0 < len(rest) < len(prompt)
    seen = prompt.removesuffix(rest)
    assert family.cut(seen) == {}
    assert family.prompt_key(seen) != family.prompt_key(prompt)
    whole, beginning, less = (family.encode_prompts([each])["prompt_embeds"][0] for each in (prompt, seen, seen[:-1]))
    same(beginning, whole)
    assert less.shape != whole.shape or not torch.allclose(less, whole)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("size", [(32, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("name", [*FLOW, *DIFFUSION])
def test_training_predicts_what_drawing_does(name: str, size: tuple[int, int], checkpointing: bool) -> None:
    family = family_in_test(build(name))
    random = torch.Generator().manual_seed(0)
    shape = (2, family.latent_channels, *(side // family.vae_factor for side in size))
    noisy = torch.randn(shape, generator=random)
    times = torch.tensor([0.3, 0.8]) if name in FLOW else torch.tensor([300, 800])
    sizes = torch.tensor([*size, 0, 0, *size], dtype=torch.float32).expand(2, 6)
    with torch.no_grad():
        arguments = family.arguments(noisy, times, family.encode_prompts(PROMPTS), sizes)
        expected = family.prediction(family.denoiser(**arguments), noisy)
    family.denoiser.train()
    if checkpointing:
        family.denoiser.enable_gradient_checkpointing()
    found = family.prediction(family.denoiser(**arguments), noisy)
    assert found.shape == noisy.shape
    assert found.requires_grad
    # a family says where checkpointing changes the answer, and training refuses it there
    assert torch.allclose(found, expected, atol=1e-5) == (not checkpointing or family.CHECKPOINTING is None)


@pytest.mark.parametrize("name", [*FLOW, *DIFFUSION])
@torch.no_grad()
def test_a_step_stays_on_the_denoisers_device_wherever_the_others_are(name: str) -> None:
    """The device without storage stands for a GPU: an operation on tensors of both it and the CPU fails there, too."""
    family = family_in_test(build(name))
    prompts, device = family.encode_prompts(PROMPTS), torch.device("meta")
    if name == "qwen_image":  # which looks whether there is padding, and nothing can be looked at there
        prompts = {key: None if key.endswith("mask") else value for key, value in prompts.items()}
    family.denoiser.to(device)
    latents = torch.empty(2, family.latent_channels, 64 // family.vae_factor, 64 // family.vae_factor, device=device)
    noisy = family.scaled(latents)
    times, sizes = torch.empty(2, device=device), torch.empty(2, 6, device=device)
    arguments = family.arguments(noisy, times, family.placed(prompts, device, torch.float32), sizes)
    for key, value in arguments.items():
        tensors = [value] if isinstance(value, torch.Tensor) else value if isinstance(value, list) else []
        assert {each.device for each in tensors if isinstance(each, torch.Tensor)} <= {device}, key
    if name == "ideogram4":  # whose drawn tokens are normalised as well
        assert family.unscaled(noisy.flatten(2).transpose(1, 2), 64, 64).device == device


@pytest.mark.parametrize("name", [*FLOW, "pixart_sigma"])
def test_steps_guidance_and_length_are_the_pipelines_defaults(name: str) -> None:
    family = family_in_test(build(name))
    asked = {key: each.default for key, each in inspect.signature(family.pipe.__call__).parameters.items()}
    guidance = asked["guidance_scale"] or asked.get("true_cfg_scale") or asked["guidance_schedule"][0]
    assert asked["num_inference_steps"] == family.STEPS
    assert guidance == family.GUIDANCE
    assert asked["max_sequence_length"] == family.LENGTH


@pytest.mark.parametrize("name", [*FLOW, *DIFFUSION])
def test_latents_are_made_as_documented(name: str) -> None:
    family = family_in_test(build(name))
    vae, config = family.pipe.vae, family.pipe.vae.config
    z = torch.randn(1, family.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    formulas = {
        "z · scale": lambda: z * config.scaling_factor,
        "(z - shift) · scale": lambda: (z - config.shift_factor) * config.scaling_factor,
        "(z - mean) / deviation of each channel": lambda: torch.stack(
            [(z[:, i] - m) / s for i, (m, s) in enumerate(zip(config.latents_mean, config.latents_std, strict=True))], 1
        ),
        "(patches of z - mean) / deviation of each channel": lambda: vae.bn(z),
    }
    torch.testing.assert_close(family.scaled(z), formulas[family.LATENTS](), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*FLOW, *DIFFUSION])
@torch.no_grad()
def test_the_time_that_is_told_is_the_documented(name: str) -> None:
    family = family_in_test(build(name))
    noisy = torch.zeros(2, family.latent_channels, 32 // family.vae_factor, 32 // family.vae_factor)
    times = torch.tensor([0.25, 0.75])
    arguments = family.arguments(noisy, times, family.encode_prompts(PROMPTS), torch.zeros(2, 6))
    found = next(arguments[key] for key in ("timestep", "timesteps", "t") if key in arguments)
    scale = getattr(family.denoiser.config, "timestep_scale", 1)
    documented = {
        "timestep": times,
        "σ": times,
        "1 - σ": 1 - times,
        "1000 σ": 1000 * times,
        "1000 σ · timestep_scale": 1000 * scale * times,
    }
    torch.testing.assert_close(found, documented[family.TIME])


@pytest.mark.parametrize("name", [*FLOW, *DIFFUSION])
@torch.no_grad()
def test_blank_prompts_have_the_shapes_of_long_ones(name: str) -> None:
    family = family_in_test(build(name), max_sequence_length=None if name in ("sd", "sdxl", "ideogram4") else 12)
    prompt = "abc" if name == "ideogram4" else "abcdefghijklmnopqrstuvwxyz" * 3
    if name == "ideogram4":  # which cuts none
        family.settings = FamilySettings(max_sequence_length=len(family.encode_prompt(prompt)["prompt_embeds"]))
    blank, long = family.blank_prompts(2), family.encode_prompts([prompt] * 2)
    assert blank.keys() == long.keys()
    for key, value in blank.items():
        for mine, theirs in zip(() if value is None else value, () if value is None else long[key], strict=True):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
