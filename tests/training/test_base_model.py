"""A base that the losses would train for something else than what it was trained for is refused before anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import (
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from ether_diffusion.families.registry import FAMILIES, UnknownFamilyError, family_of
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.training import dreambooth
from ether_diffusion.training.base_model import BaseModelError
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

Settings = Callable[..., DreamBoothConfig]


def folder_of(pipe: DiffusionPipeline, folder: Path) -> str:
    pipe.save_pretrained(folder / "base")
    return str(folder / "base")


SCHEDULERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "EDM": (lambda _: EDMDPMSolverMultistepScheduler(), "scheduler is EDMDPMSolverMultistepScheduler, whose noise"),
    "flow": (lambda _: FlowMatchEulerDiscreteScheduler(), "scheduler is FlowMatchEulerDiscreteScheduler, whose noise"),
    "flow sigmas": (lambda c: UniPCMultistepScheduler.from_config(c, use_flow_sigmas=True), "whose noise"),
    "continuous": (lambda c: EulerDiscreteScheduler.from_config(c, timestep_type="continuous"), "whose noise"),
    "zero terminal SNR": (
        lambda c: EulerDiscreteScheduler.from_config(c, rescale_betas_zero_snr=True),
        "it predicts epsilon, and with rescale_betas_zero_snr",
    ),
    "sample": (lambda c: PNDMScheduler.from_config(c, prediction_type="sample"), "it predicts sample"),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_another_objective_is_refused(case: str, settings: Settings, tmp_path: Path) -> None:
    make, message = SCHEDULERS[case]
    pipe = tiny_pipeline()
    pipe.register_modules(scheduler=make(pipe.scheduler.config))
    config = settings(pretrained_model_name_or_path=folder_of(pipe, tmp_path))
    with pytest.raises(BaseModelError, match=rf"cannot be trained here: .*{message}"):
        dreambooth.run(config)
    assert not config.output_dir.exists()


OTHERS = (
    "WanPipeline",
    "SanaVideoPipeline",
    "StableVideoDiffusionPipeline",
    "FluxKontextPipeline",
    "FluxFillPipeline",
    "FluxControlPipeline",
    "QwenImageEditPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLImg2ImgPipeline",  # the refiner
    "ChromaInpaintPipeline",
    "SanaSprintPipeline",
    "PixArtAlphaPipeline",
)
"""Video, edit, inpainting and refiner pipelines, and relatives of families."""


@pytest.mark.parametrize("name", OTHERS)
def test_a_base_of_no_family_is_refused_with_the_list_of_those_served(
    name: str, settings: Settings, tmp_path: Path
) -> None:
    assert hasattr(diffusers, name)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.42.1"}))
    with pytest.raises(BaseModelError, match=f"cannot be trained here: it is a {name}, which nothing here") as refused:
        dreambooth.run(settings(pretrained_model_name_or_path=str(tmp_path)))
    for family in FAMILIES.values():
        assert f"{family.TITLE} ({' or '.join(family.PIPELINES)})" in str(refused.value)


def test_a_pipeline_of_another_use_is_of_no_family() -> None:
    pipe = tiny_pipeline()
    other = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(UnknownFamilyError, match="it is a StableDiffusionInpaintPipeline"):
        family_of(other)


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_a_denoiser_that_takes_more_than_latents_is_refused(xl: bool) -> None:
    pipe = tiny_pipeline(xl=xl)
    pipe.unet.register_to_config(in_channels=9)
    assert "its denoiser takes 9 channels, and latents have 4" in str(family_of(pipe).misfit())


def test_the_refiner_is_refused_under_the_name_of_its_base() -> None:
    pipe = tiny_pipeline(xl=True)
    assert family_of(pipe).misfit() is None
    pipe.register_modules(text_encoder=None)
    assert "it is the refiner" in str(family_of(pipe).misfit())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": [0.1] * 4, "latents_std": [1.0] * 4}, "latents_mean and latents_std"),
        ({"shift_factor": 0.06}, "shift_factor=0.06"),
    ],
)
def test_statistics_of_latents_that_nothing_applies_are_refused(
    changes: dict[str, Any], message: str, settings: Settings, tmp_path: Path
) -> None:
    pipe = tiny_pipeline()
    pipe.vae.register_to_config(**changes)
    with pytest.raises(BaseModelError, match=message):
        dreambooth.run(settings(pretrained_model_name_or_path=folder_of(pipe, tmp_path)))


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LCMScheduler, PNDMScheduler])
def test_other_samplers_of_the_same_noise_are_trained(kind: Any, settings: Settings, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.register_modules(scheduler=kind.from_config(pipe.scheduler.config))
    dreambooth.run(settings(pretrained_model_name_or_path=folder_of(pipe, tmp_path), max_train_steps=1))
