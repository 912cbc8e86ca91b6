"""What the tests of training share: reading run folders, and drawing with a pipeline by diffusers' own means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

PROMPT = "a photo of qwe dog"

SMALL: dict[str, Any] = {
    "instance_prompt": PROMPT,
    "max_train_steps": 3,
    "num_inference_steps": 2,
    "num_validation_images": 1,
    "validation_prompt": PROMPT,
}
"""A run of a second."""

QUIET = SMALL | {"num_validation_images": 0, "resolution": 32}
"""The same without samples, on pictures of half the model's size."""


def draw_photo(path: Path, shade: int = 0, size: tuple[int, int] = (64, 64)) -> Path:
    """A picture of (width, height) ``size`` with an ellipse, different for every ``shade``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (40 * shade % 256, 90, 160))
    box = (8 + 3 * shade, 10, size[0] - 12, size[1] - 20 + shade)
    ImageDraw.Draw(image).ellipse(box, fill=(250, 200, 70 * shade % 256))
    image.save(path)
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` without the time they took."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "steps_per_second"} for row in rows]


def provenance(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "provenance.json").read_text()))


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def trained(run: Path, step: int) -> dict[str, Tensor]:
    """What was trained, as the checkpoint of ``step`` has it."""
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "trained.safetensors")


def optimizer_state(run: Path, step: int) -> dict[str, Any]:
    return dict(torch.load(run / "checkpoints" / f"step-{step:06d}" / "optimizer.bin", weights_only=True))


def schedule_state(run: Path, step: int) -> dict[str, Any]:
    path = run / "checkpoints" / f"step-{step:06d}" / "custom_checkpoint_0.pkl"
    return dict(torch.load(path, weights_only=True))


def samples(run: Path) -> dict[str, np.ndarray]:
    """The pixels of every sample, by ``step-000003/00.png``."""
    folder = run / "samples"
    return {str(path.relative_to(folder)): pixels(path) for path in sorted(folder.glob("*/*.png"))}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def draw(pipe: DiffusionPipeline, prompt: str = PROMPT, seed: int = 0, steps: int = 2) -> np.ndarray:
    """An image with the training programs' default sampler, by the pipeline's own ``__call__``."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    image = pipe(prompt, num_inference_steps=steps, guidance_scale=7.5, generator=generator).images[0]
    return np.array(image)


def same_tensors(left: Any, right: Any) -> bool:
    """Whether two nested structures of tensors are equal bit for bit, with the same keys."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and np.array_equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_tensors(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same_tensors(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def relative_change(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of ``right``, of all tensors together."""
    assert left.keys() == right.keys()
    difference = sum(float((left[key].double() - right[key].double()).square().sum()) for key in right)
    return (difference / sum(float(value.double().square().sum()) for value in right.values())) ** 0.5
