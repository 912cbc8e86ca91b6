"""Two processes over gloo train what one process trains with twice the batch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training.helpers import checkpoints, metrics, provenance, relative_change, same_tensors, samples, trained

Train = Callable[..., Path]
Flags = Callable[..., list[str]]

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def launch(flags: Flags, program: list[str], one_thread: dict[str, str], tmp_path: Path) -> Callable[..., Path]:
    """Run the program in two processes."""

    def run(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        command = [*LAUNCH, program[1], *flags(folder, **changes)]
        ended = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return folder

    return run


def test_two_processes_equal_one_with_twice_the_batch_also_when_resumed(
    train: Train, launch: Callable[..., Path], wide_photos: Path
) -> None:
    """To rounding; Adam's ε keeps it from blowing up the rounding of gradients near zero."""
    common: dict[str, Any] = {
        "instance_data_dir": wide_photos,
        "train_text_encoder": True,
        "with_prior_preservation": True,
        "class_prompt": "a photo of a dog",
        "num_class_images": 3,
        "sample_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "num_validation_images": 1,
        "resolution": 32,
    }
    one = train("one", max_train_steps=4, train_batch_size=2, checkpointing_steps=2, **common)
    two = launch("two", max_train_steps=2, **common)
    assert provenance(two)["num_processes"] == 2
    for path in (one / "class_images").iterdir():
        assert path.read_bytes() == (two / "class_images" / path.name).read_bytes()
    assert relative_change(trained(two, 2), trained(one, 2)) < 1e-6

    launch("two", max_train_steps=4, resume="latest", **common)
    assert checkpoints(two) == ["step-000002", "step-000004"]
    assert relative_change(trained(two, 4), trained(one, 4)) < 1e-6
    assert not same_tensors(trained(one, 2), trained(one, 4))
    for left, right in zip(metrics(two), metrics(one), strict=True):
        for key in ("loss", "instance_loss", "prior_loss", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=1e-5), key
    assert same_tensors(samples(two)["step-000000/00.png"], samples(one)["step-000000/00.png"])


def test_two_processes_take_the_captions_and_the_average_of_one(
    train: Train, launch: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "captioned"
    shutil.copytree(photos, folder)
    rows = ['{"file_name": "0.png", "text": ["a, b, c, d", "one dog"]}', '{"file_name": "2.png", "text": "e, f, g"}']
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    common: dict[str, Any] = {
        "instance_data_dir": folder,
        "shuffle_tags": True,
        "caption_prefix": "qwe,",
        "ema_decay": 0.8,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "max_train_steps": 4,
    }
    one, two = train("one", train_batch_size=2, **common), launch("two", **common)
    assert provenance(two)["num_processes"] == 2
    final, average = ([load_file(run / "checkpoints" / "step-000004" / name) for run in (two, one)] for name in (
        "trained.safetensors", "averaged.safetensors",
    ))  # fmt: skip
    assert relative_change(*final) < 1e-6
    assert relative_change(*average) < 1e-6
    assert relative_change(average[0], final[0]) > 1e-3
    for left, right in zip(metrics(two), metrics(one), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)


def test_two_processes_train_a_new_token_as_one_does(
    train: Train, launch: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    """The token is in no prompt of one of the processes at some steps."""
    folder = tmp_path / "captioned"
    shutil.copytree(photos, folder)
    (folder / "0.txt").write_text("a photo of an x")
    common: dict[str, Any] = {
        "instance_data_dir": folder,
        "instance_prompt": "a photo of <dog> x",
        "placeholder_token": "<dog>",
        "token_lr": 1e-2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "max_train_steps": 4,
    }
    one, two = train("one", train_batch_size=2, **common), launch("two", **common)
    assert relative_change(trained(two, 4), trained(one, 4)) < 1e-6
