"""Which bases of the recipes are in the cache of downloads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants

from ether_diffusion.doctor.bases import KnownBase, known_bases

NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"
COMMIT = "0" * 40


@pytest.fixture
def snapshot(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a download of Stable Diffusion 1.5, as the Hub's cache keeps it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(base_folder, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def found() -> KnownBase:
    (base,) = (base for base in known_bases() if base.name == NAME)
    return base


def test_a_base_that_diffusers_loads_from_the_cache_is_here(snapshot: Path) -> None:
    assert found() == KnownBase(
        NAME, ("controlnet_sd15", "controlnet_sd15_paper", "dreambooth_sd15", "eval_dreambooth"), "here"
    )
    cache = snapshot.parents[2]
    assert StableDiffusionPipeline.from_pretrained(NAME, cache_dir=cache, local_files_only=True)


def _remove_weights(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def _remove_part(folder: Path) -> None:
    shutil.rmtree(folder / "unet")


def _lose_shard(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    shards = {key: f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for key, number in (("a", 1), ("b", 2))}
    path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def _keep_another_variant(folder: Path) -> None:
    """Which a recipe without ``variant`` does not load."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.bin"):
        StableDiffusionPipeline.from_pretrained(folder)


def _keep_an_index_of_nothing(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": []}')


SPOILS = [_remove_weights, _remove_part, _lose_shard, _keep_another_variant, _keep_an_index_of_nothing]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_broken_download_says_what_it_lacks(snapshot: Path, spoil: Callable[[Path], None]) -> None:
    spoil(snapshot)
    assert (found().state, found().lacks) == ("incomplete", ("unet",))


def test_a_safety_checker_that_training_does_not_need_is_not_missed(snapshot: Path) -> None:
    index = json.loads((snapshot / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (snapshot / "model_index.json").write_text(json.dumps(index))
    assert found().state == "here"


def test_without_a_download_only_the_embedded_bases_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    states = {base.name: base.state for base in known_bases()}
    assert states.pop("playground") == states.pop("playground-flow") == "embedded"
    assert NAME in states
    assert set(states.values()) == {"absent"}
