"""The base that is shipped: that it is whole, and that it reaches on new seeds what its build report says."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ether_diffusion import playground
from ether_diffusion.playground.build.assemble import LIMIT, check_size
from ether_diffusion.playground.build.autoencoder import reconstructions
from ether_diffusion.playground.build.drawings import picture_array, to_unit
from ether_diffusion.playground.build.evaluate import (
    SAMPLING,
    clip_figures,
    dino_figures,
    generate,
    seen_figures,
    segmenter_figures,
)
from ether_diffusion.playground.build.judges import Judges
from ether_diffusion.playground.build.metrics import psnr
from ether_diffusion.playground.world import Scene, random_scene

SEED = 77
"""Of drawings that neither the build nor its report has seen."""


@pytest.fixture(scope="module")
def reached() -> dict[str, float]:
    record: dict[str, Any] = json.loads((playground.BASE / "build.json").read_text())
    return {name: entry["value"] for name, entry in record["figures"].items()}


@pytest.fixture(scope="module")
def judges() -> Judges:
    return Judges(playground.BASE / "judges", torch.device("cpu"))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [random_scene(SEED, index) for index in range(128)]


def test_it_weighs_no_more_than_it_may() -> None:
    assert check_size(playground.BASE) <= LIMIT == 20_000_000
    everything = sum(path.stat().st_size for path in playground.BASE.rglob("*") if path.is_file())
    assert everything <= 21_000_000


def test_all_weights_are_fp16_and_finite() -> None:
    files = list(playground.BASE.rglob("*.safetensors"))
    assert len(files) == 6
    for file in files:
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - it is no mapping
                tensor = weights.get_tensor(key)
                assert tensor.dtype in (torch.float16, torch.int64), (file, key)
                assert tensor.isfinite().all(), (file, key)


def test_load_gives_a_pipeline_in_one_dtype() -> None:
    pipe = playground.load()
    dtypes = {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()}
    assert dtypes == {torch.float32}
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 64


def test_only_the_name_is_the_embedded_base() -> None:
    assert playground.base_folder("playground") == str(playground.BASE)
    assert playground.base_folder("./playground") == "./playground"
    assert playground.judge_folder("playground", "clip") == str(playground.BASE / "judges" / "clip")
    assert playground.judge_folder("facebook/dino-vits16", "dino") == "facebook/dino-vits16"


def test_the_autoencoder_is_as_sharp_as_reported(reached: dict[str, float], scenes: list[Scene]) -> None:
    pictures = torch.from_numpy(picture_array(scenes))
    vae = playground.load().vae
    assert psnr(reconstructions(vae, pictures), to_unit(pictures)) == pytest.approx(
        reached["autoencoder_psnr"], abs=0.7
    )


def test_the_judges_see_as_well_as_reported(reached: dict[str, float], judges: Judges, scenes: list[Scene]) -> None:
    seen = clip_figures(judges, scenes)
    assert seen["class"] >= reached["clip_class"] - 0.1
    assert seen["colour"] >= reached["clip_colour"] - 0.1
    assert seen["background"] >= reached["clip_background"] - 0.05
    assert segmenter_figures(judges, scenes)["segmenter_miou"] >= reached["segmenter_miou"] - 0.08
    assert dino_figures(judges, SEED)["dino_subject"] >= reached["dino_subject"] - 0.04


@pytest.mark.slow
def test_the_base_draws_what_it_is_asked_for(reached: dict[str, float], judges: Judges) -> None:
    lone = (scene for index in itertools.count() if len((scene := random_scene(SEED, index)).objects) == 1)
    asked = list(itertools.islice(lone, 16))
    pipe = playground.load()
    pipe.set_progress_bar_config(disable=True)
    drawn = generate(pipe, asked, SEED, SAMPLING["unet"]).pictures
    seen = seen_figures(judges, asked, drawn)
    for figure in ("class", "colour", "background"):
        assert seen[figure] >= reached[f"base_{figure}"] - 0.2, figure
    assert np.std([picture.mean().item() for picture in drawn]) > 0.05  # not one picture for all
