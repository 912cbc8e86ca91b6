"""What a control was trained on stands in its file, and another picture is told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open

import ether_diffusion as ether
from ether_diffusion.control.conditions import canny, colour_map
from ether_diffusion.control.expected import expectation, misfit
from ether_diffusion.control.pipeline import control_tensor, controlled
from ether_diffusion.pipelines.control_encoder import ControlEncoder, ControlEncoderConfig
from ether_diffusion.pipelines.control_hook import attach_control
from ether_diffusion.pipelines.file import AdapterFile
from ether_diffusion.playground.pairs import draw_pair
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.training import control
from ether_diffusion.training.control_config import ControlConfig

CANNY = ControlEncoderConfig(32, kind="canny", thresholds=(100, 200))
MAP = ControlEncoderConfig(32, condition="map", kind="map", classes=tuple(f"class {n}" for n in range(17)))
UNKNOWN = ControlEncoderConfig(32, condition="map", kind="map")
OLD = ControlEncoderConfig(32)


def photo(side: int = 96) -> Image.Image:
    """Noise over a gradient: thousands of colours, few of them black or white."""
    ramp = np.linspace(40, 200, side)[:, None, None] + np.zeros((side, side, 3))
    noise = np.random.default_rng(0).normal(0, 20, (side, side, 3))
    return Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8))


def drawn(seed: int = 0) -> Image.Image:
    return draw_pair(seed, 0).image


def told(image: Image.Image, config: ControlEncoderConfig, side: int | None = None) -> str | None:
    return misfit(control_tensor(image, 2, config.condition == "map", side, side), config)


@pytest.mark.parametrize("side", [None, 48, 80, 128])
@pytest.mark.parametrize("seed", range(3))
def test_what_a_control_was_trained_on_fits_at_any_size(seed: int, side: int | None) -> None:
    pytest.importorskip("cv2")
    semantic = draw_pair(seed, 0).condition
    assert semantic is not None
    assert told(canny(drawn(seed), 100, 200), CANNY, side) is None
    assert told(semantic, MAP, side) is None
    assert told(semantic, UNKNOWN, side) is None
    assert told(photo(), OLD, side) is None


def test_another_picture_is_told_with_what_is_expected() -> None:
    for image, config, said in (
        (photo(), CANNY, "are neither black nor white: is it a photo?"),
        (Image.new("RGB", (96, 96), (255, 0, 0)), CANNY, "has colours"),
        (photo(), MAP, "colours: is it a photo?"),
        (photo(), UNKNOWN, "colours: is it a photo?"),
        (colour_map(np.arange(96 * 96).reshape(96, 96) % 17 + 17), MAP, "100% of this picture have colours of none"),
    ):
        found = told(image, config)
        assert found is not None
        assert found.startswith(f"the control expects {expectation(config)}; ")
        assert said in found
    page = Image.new("RGB", (96, 96), "black")
    ImageDraw.Draw(page).ellipse((20, 20, 70, 70), outline="white")
    assert told(page, CANNY) is None
    assert "inverted" in str(told(ImageOps.invert(page), CANNY))
    assert expectation(CANNY).endswith("made by canny(image, 100, 200) of ether_diffusion.control.conditions")
    assert "of 17 classes (class 0, class 1, class 2, class 3, class 4, class 5, …)" in expectation(MAP)


def test_drawing_warns(pipe: DiffusionPipeline, caplog: pytest.LogCaptureFixture) -> None:
    encoder = ControlEncoder.of(pipe.unet, pipe.vae_scale_factor)
    encoder.config = ControlEncoderConfig(encoder.config.out_channels, encoder.config.channels, kind="canny")
    attach_control(pipe.unet, encoder, "edges")
    with controlled(pipe, Image.new("RGB", (64, 64), "black")):
        pass
    assert not caplog.records
    with controlled(pipe, photo(64)):
        pass
    assert "the control expects canny edges, white on black" in caplog.text


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "maps": ({}, {"condition": "map", "kind": "map", "thresholds": None}),
    "canny": (
        {"condition": "canny", "canny_low": 50, "canny_high": 90},
        {"condition": "image", "kind": "canny", "classes": None, "thresholds": (50, 90)},
    ),
    "image": ({"condition": "image"}, {"condition": "image", "kind": "image", "classes": None, "thresholds": None}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_training_stores_what_its_control_expects(name: str, base_folder: Path, tmp_path: Path) -> None:
    changes, expected = RUNS[name]
    if name == "canny":
        pytest.importorskip("cv2")
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base_folder),
        "output_dir": tmp_path / "run",
        "train_data_dir": "playground",
        "method": "ether",
        "max_train_steps": 1,
        "num_validation_images": 0,
    }
    control.run(ControlConfig(**values | changes))
    found = AdapterFile.read(tmp_path / "run").control
    assert found is not None
    assert {key: getattr(found.config, key) for key in expected} == expected
    if name == "maps":
        assert found.config.classes is not None
        assert (len(found.config.classes), found.config.classes[:2]) == (17, ("sky", "cloud"))
    pipe = tiny_pipeline()
    ether.load(pipe, tmp_path / "run", name="control")
    ether.save(pipe, tmp_path / "again", name="control")
    again = AdapterFile.read(tmp_path / "again").control
    assert again is not None
    assert again.config == found.config


def test_a_file_of_0_1_loads_and_expects_nothing(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    encoder = ControlEncoder.of(pipe.unet, pipe.vae_scale_factor, "map")
    path = AdapterFile({}, {}, control=encoder).write(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert set(json.loads(file.metadata()["control_encoder"])) == {"out_channels", "channels", "condition"}
    control_read = AdapterFile.read(path).control
    assert control_read is not None
    assert (control_read.config.kind, control_read.config.classes, control_read.config.thresholds) == (None,) * 3
    assert torch.equal(control_read.conv_in.weight, encoder.conv_in.weight)
