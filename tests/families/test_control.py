"""Controls on transformers: the encoder's features are added after the first layer, as a grid or as tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import shake
from PIL import Image
from training.helpers import draw_photo, samples

import ether_diffusion as ether
from ether_diffusion.families.parts import denoiser_of
from ether_diffusion.families.registry import family_of
from ether_diffusion.pipelines.control_encoder import ControlEncoder
from ether_diffusion.pipelines.control_hook import attach_control
from ether_diffusion.private import forget_accelerator
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.drawing import load_pipeline
from ether_diffusion.training import control
from ether_diffusion.training.base_model import BaseModelError
from ether_diffusion.training.control_config import ControlConfig

FAMILIES = ("sd3", "flux", "flux2", "qwen_image", "z_image")
SETTINGS: dict[str, Any] = {
    "max_train_steps": 3,
    "num_inference_steps": 2,
    "resolution": 32,
    "condition": "image",
    "learning_rate": 0.02,
    "encoder_lr": 0.5,
    "num_validation_images": 1,
    "num_validation_pairs": 1,
}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pairs; the condition is the picture's negative."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(3):
        path = draw_photo(folder / "images" / f"{number}.png", number)
        (folder / "hints").mkdir(exist_ok=True)
        with Image.open(path) as image:
            Image.fromarray(255 - np.asarray(image)).save(folder / "hints" / f"{number}.png")
        rows.append({"file_name": f"images/{number}.png", "conditioning_image": f"hints/{number}.png", "text": "a dog"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run_control(base: Callable[[str], Path], pairs: Path, tmp_path: Path) -> Callable[[str], Path]:
    def run(family: str) -> Path:
        forget_accelerator()
        folder = tmp_path / "run"
        control.run(
            ControlConfig(
                pretrained_model_name_or_path=str(base(family)),
                output_dir=folder,
                train_data_dir=str(pairs),
                **SETTINGS,
            )
        )
        return folder

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_pipeline_draws_under_the_control_what_training_drew(
    family: str, run_control: Callable[[str], Path], base: Callable[[str], Path]
) -> None:
    run = run_control(family)
    drawn = samples(run)
    pipe = load_pipeline(Base(str(base(family))))
    ether.load(pipe, run)
    with Image.open(run / "samples" / "conditions" / "00.png") as condition:
        condition.load()

    def draw(image: Image.Image) -> np.ndarray:
        with ether.controlled(pipe, image):
            arguments = family_of(pipe).drawing(["a dog"], family_of(pipe).GUIDANCE)
            dice = [torch.Generator().manual_seed(0)]
            found = pipe(**arguments, height=32, width=32, num_inference_steps=2, generator=dice).images[0]
        return np.asarray(found).astype(int)

    assert np.abs(draw(condition) - drawn["step-000003/00.png"].astype(int)).max() <= 1
    other = Image.fromarray(255 - np.asarray(condition))
    assert np.abs(draw(other) - draw(condition)).max() > 0
    with pytest.raises(RuntimeError, match="has no condition"):
        pipe(prompt=["a dog"], height=32, width=32, num_inference_steps=1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_land_on_the_patch_that_they_were_made_of(family: str, base: Callable[[str], Path]) -> None:
    """An encoder that answers the condition itself: the first layer's output grows by it where the condition is."""
    pipe = load_pipeline(Base(str(base(family))))
    kind, denoiser = family_of(pipe), denoiser_of(pipe)
    place = str(kind.CONTROL_PLACE)
    encoder = ControlEncoder.of(denoiser, kind.divisor, place=place)
    control_ = attach_control(denoiser, encoder, "it", place)
    rows, columns = 2, 3
    marks = torch.zeros(1, encoder.config.out_channels, rows, columns)
    marks[:, :, 1, 2] = 1
    layer, seen = denoiser.get_submodule(place), []
    layer.register_forward_hook(lambda module, given, output: seen.append(output))
    noisy = torch.zeros(
        1, kind.latent_channels, kind.divisor * rows // kind.vae_factor, kind.divisor * columns // kind.vae_factor
    )
    arguments = kind.arguments(noisy, torch.tensor([0.5]), kind.encode_prompts(["a dog"]), torch.zeros(1, 6))
    for features in (torch.zeros_like(marks), marks):
        with control_.given({"it": features}):
            denoiser(**arguments)
    difference = seen[1] - seen[0]
    if difference.dim() == 2:  # all pictures in one row; this one's is filled up to 32 tokens
        assert not difference[rows * columns :].any()
        difference = difference[None, : rows * columns]
    grid = difference if difference.dim() == 4 else difference.transpose(1, 2).unflatten(2, (rows, columns))
    torch.testing.assert_close(grid, marks, atol=1e-6, rtol=0)


def test_a_family_without_such_a_layer_is_refused(run_control: Callable[[str], Path]) -> None:
    with pytest.raises(BaseModelError, match=r"Lumina.* has no first layer that a control could be added after"):
        run_control("lumina2")


@torch.no_grad()
def test_pictures_in_one_row_have_each_their_own_condition(base: Callable[[str], Path]) -> None:
    """Z-Image embeds the patches of all pictures at once: conditions go to their picture, under guidance to both."""
    pipe = load_pipeline(Base(str(base("z_image"))))
    kind, denoiser = family_of(pipe), denoiser_of(pipe)
    encoder = ControlEncoder.of(denoiser, kind.divisor, place=str(kind.CONTROL_PLACE))
    control_ = attach_control(denoiser, encoder, "it", str(kind.CONTROL_PLACE))
    features = torch.randn(2, encoder.config.out_channels, 2, 3, generator=torch.Generator().manual_seed(0))

    def answers(given: torch.Tensor, *pictures: int) -> torch.Tensor:
        noisy = torch.zeros(len(pictures), kind.latent_channels, 2 * kind.divisor // kind.vae_factor, 6)
        prompts = kind.encode_prompts(["a dog"] * len(pictures))
        arguments = kind.arguments(noisy, torch.full((len(pictures),), 0.5), prompts, torch.zeros(len(pictures), 6))
        with control_.given({"it": given}):
            return kind.prediction(denoiser(**arguments), noisy)

    alone = [answers(features[i : i + 1], i)[0] for i in range(2)]
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    twice = answers(features, 0, 1, 0, 1)
    for number, answer in enumerate(twice):
        torch.testing.assert_close(answer, alone[number % 2], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot be shared among a batch of 3"):
        answers(features, 0, 1, 0)
    # as many tokens after they are filled up to 32, and yet another picture
    for other in ((3, 2), (2, 2), (4, 8)):
        with pytest.raises(ValueError, match="resize one of them"):
            answers(torch.zeros(1, encoder.config.out_channels, *other), 0)


@pytest.mark.parametrize("family", ["flux", "z_image"])
@pytest.mark.parametrize("lora_first", [False, True])
def test_a_lora_around_the_first_layer_is_no_hindrance(
    family: str, lora_first: bool, base: Callable[[str], Path], tmp_path: Path
) -> None:
    def loaded() -> DiffusionPipeline:
        pipe = load_pipeline(Base(str(base(family))))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    other = loaded()
    shake(ether.attach(other.transformer, ether.EtherConfig(targets="all"), "other"))
    ether.export_lora(other, tmp_path / "lora.safetensors")
    pipe, lora = loaded(), str(tmp_path / "lora.safetensors")
    place = str(family_of(pipe).CONTROL_PLACE)
    if lora_first:
        pipe.load_lora_weights(lora)
    encoder = ControlEncoder.of(pipe.transformer, family_of(pipe).divisor, place=place)
    attach_control(pipe.transformer, encoder, "it", place)
    if not lora_first:
        pipe.load_lora_weights(lora)
    with ether.controlled(pipe, Image.new("RGB", (32, 32))):
        arguments = family_of(pipe).drawing(["a dog"], 2.0)
        pipe(**arguments, height=32, width=32, num_inference_steps=1, output_type="latent")
