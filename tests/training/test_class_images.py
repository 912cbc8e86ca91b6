"""Class images are used again only if they are what would be generated now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ether_diffusion.families.registry import family_of
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.training.class_images import RECORD, generate_class_images
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.samples import Sampler

Settings = Callable[..., DreamBoothConfig]


def generate(pipe: DiffusionPipeline, config: DreamBoothConfig, folder: Path, prompt: str) -> None:
    generate_class_images(
        Sampler(family_of(pipe), config, Accelerator()), folder, prompt, number=2, batch_size=2, seed=0
    )


@pytest.mark.parametrize(
    ("changes", "prompt", "base_seed", "named"),
    [
        ({}, "a red car", 0, "prompt: a dog → a red car"),
        ({"guidance_scale": 2.0}, "a dog", 0, "guidance_scale: 7.5 → 2.0"),
        ({}, "a dog", 1, "base_hash: "),
    ],
    ids=["prompt", "setting", "base"],
)
def test_images_generated_otherwise_are_refused_and_kept(
    changes: dict[str, float], prompt: str, base_seed: int, named: str, settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "class"
    generate(tiny_pipeline(), settings(resolution=16), folder, "a dog")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="choose another --class_data_dir") as refused:
        generate(tiny_pipeline(seed=base_seed), settings(resolution=16, **changes), folder, prompt)
    assert named in str(refused.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_own_images_need_no_record(pipe: DiffusionPipeline, settings: Settings, photos: Path) -> None:
    before = sorted(photos.iterdir())
    generate(pipe, settings(resolution=16), photos, "a dog")
    assert sorted(photos.iterdir()) == before


def test_class_images_never_lie_among_the_photos(train: Callable[..., Path], photos: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(photos)
    before = sorted(photos.iterdir())
    for folder in (photos, tmp_path / "link"):
        with pytest.raises(ValueError, match="class_data_dir and instance_data_dir are the same folder"):
            train(class_data_dir=folder, with_prior_preservation=True, class_prompt="a dog", num_class_images=9)
    assert sorted(photos.iterdir()) == before


@pytest.mark.parametrize("number", [1, 2, 5])
def test_images_of_another_prompt_are_refused_whatever_number_is_wanted(
    number: int, pipe: DiffusionPipeline, settings: Settings, tmp_path: Path
) -> None:
    folder, sampler = tmp_path / "class", Sampler(family_of(pipe), settings(resolution=16), Accelerator())
    generate(pipe, settings(resolution=16), folder, "a dog")
    with pytest.raises(ValueError, match="prompt: a dog → a red car"):
        generate_class_images(sampler, folder, "a red car", number=number, batch_size=2, seed=0)
    (folder / RECORD).unlink()
    with pytest.raises(ValueError, match=r"no generated\.txt that says with which prompt"):
        generate_class_images(sampler, folder, "a dog", number=number, batch_size=2, seed=0)
