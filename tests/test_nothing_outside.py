"""No program writes or removes anything outside of its run folder and the cache, nor files of others in there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training.helpers import QUIET, SMALL, draw_photo

import ether_diffusion
from ether_diffusion.cli.programs.studies import bench as bench_main
from ether_diffusion.cli.programs.studies import controls as controls_main
from ether_diffusion.evaluation.overview import write_report
from ether_diffusion.playground.pairs import write_pairs
from ether_diffusion.private import forget_accelerator
from ether_diffusion.training import control, dreambooth
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

OWN = ("out", "cache")
"""What a program may write to: its folder, and the cache."""
PACKAGE = Path(ether_diffusion.__file__).parent


def content(folder: Path, without: tuple[Path, ...] = ()) -> dict[str, str]:
    """Every file, link and folder with a hash of what it holds; caches of Python's code left out."""
    found: dict[str, str] = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and Path(place, name) not in without]
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink():
                found[str(path)] = f"link to {path.readlink()}"
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = "folder"
    return found


@pytest.fixture
def tree(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder: photos, pairs, a base, another run, notes everywhere; programs are started in it."""
    for number in range(3):
        draw_photo(tmp_path / "photos" / "dog" / f"{number}.png", number, (64 + 16 * number, 64))
    (tmp_path / "photos" / "dog" / "0.txt").write_text("a photo of qwe dog on grass")
    shutil.copytree(base_folder, tmp_path / "base")
    write_pairs(tmp_path / "pairs", 3)
    for name in ("runs/other/ether_weights.safetensors", "runs/other/checkpoints/step-000001/trained.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"of another run")
    for name in ("config.yaml", "samples/step-000001/00.png", "results/a.json", "home/.cache/x", "out/mine/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield tmp_path
    forget_accelerator()


def trained(**changes: Any) -> None:
    """Photos of several shapes with class images, then on from a checkpoint, then anew."""
    values = QUIET | {"pretrained_model_name_or_path": "base", "output_dir": "out", "cache_dir": "cache"}
    values |= {"instance_data_dir": "photos/dog", "aspect_ratio_buckets": True, "num_validation_images": 1}
    values |= {"with_prior_preservation": True, "class_prompt": "a photo of a dog", "num_class_images": 1}
    values |= {"checkpointing_steps": 1, "validation_steps": 1, "checkpoints_total_limit": 2}
    for more in ({}, {"resume": "step-000002"}, {"overwrite": True}):
        forget_accelerator()
        dreambooth.run(DreamBoothConfig(**values | changes | more))


def several() -> None:
    trained(subjects_dir="photos", instance_data_dir=Path(), aspect_ratio_buckets=False, with_prior_preservation=False)


def controlled() -> None:
    values = SMALL | {"pretrained_model_name_or_path": "base", "output_dir": "out", "train_data_dir": "pairs"}
    values |= {"condition": "map", "num_validation_pairs": 1, "cache_dir": "cache", "checkpointing_steps": 1}
    del values["instance_prompt"]
    for more in ({}, {"resume": "step-000001"}, {"overwrite": True}):
        forget_accelerator()
        control.run(ControlConfig(**values | more))


def benchmarked() -> None:
    subjects = [
        {"name": "dog", "class": "dog", "references": str(Path("photos/dog").resolve()), "prompts": ["a {token}"]}
    ]
    recipe = {
        "protocol": "out/protocol.json",
        "arms": {"ether": {"method": "ether"}, "full": {"method": "full"}},
        "training": {"pretrained_model_name_or_path": "base", "max_train_steps": 1, "resolution": 32},
        **{"images_per_prompt": 1, "class_images": 1, "num_inference_steps": 1, "dino": "playground"},
        **{"clip": "playground", "output_dir": "out"},
    }
    Path("out", "protocol.json").write_text(json.dumps(subjects))
    Path("out", "recipe.json").write_text(json.dumps(recipe))
    for _ in range(2):
        bench_main(["--config", "out/recipe.json"])
    write_report([Path("out")], Path("out/report.html"))


def studied() -> None:
    recipe = {
        "training": {"pretrained_model_name_or_path": "base", "train_data_dir": "pairs", "condition": "map"},
        "arms": {"ETHER": {"method": "ether", "learning_rate": [1e-2, 1e-3]}, "encoder alone": {"method": "none"}},
        **{"eval_steps": [1, 2], "pairs": 2, "samples": 1, "num_inference_steps": 1, "data": "pairs"},
        "compare_with": ["encoder alone"],
        "output_dir": "out",
    }
    Path("out", "recipe.json").write_text(json.dumps(recipe))
    for _ in range(2):
        controls_main(["--config", "out/recipe.json"])


@pytest.mark.parametrize("program", [trained, several, controlled, benchmarked, studied])
def test_nothing_but_the_run_folder_and_the_cache_changes(program: Callable[[], None], tree: Path) -> None:
    own = tuple(tree / name for name in OWN)
    before, package = content(tree, own), content(PACKAGE)
    program()
    assert len(content(tree / "out")) > 10  # it did something
    assert content(tree, own) == before
    assert content(PACKAGE) == package
    assert (tree / "out" / "mine" / "notes.txt").read_text() == "mine"
