"""Pictures of a run of train_controlnet.py: several samples for every condition of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from ether_diffusion.control.conditions import canny, colour_map, load_condition
from ether_diffusion.control.pipeline import control_tensor, controlled
from ether_diffusion.data.randomness import generator
from ether_diffusion.evaluation.controls.generated import Sample, write_generated_metadata
from ether_diffusion.metrics.backbones import as_rgb
from ether_diffusion.metrics.control_tasks import Pair
from ether_diffusion.metrics.segmentation import Segmenter
from ether_diffusion.runs.record import Run
from ether_diffusion.training.base_model import vae_factor


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
        samples: for each condition.
        batch_size: pictures at a time.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; both of its branches see the control.
        strength: factor of the control.
        seed: of all noise.
    """

    samples: int = 4
    batch_size: int = 8
    num_inference_steps: int = 50
    guidance_scale: float = 9.0
    strength: float = 1.0
    seed: int = 0


class Conditions:
    """What a run is to follow for a pair, as it saw conditions in training: given, or made from the original.

    Args:
        run: what it was trained on.
        device: where its segmenter computes, if it has one.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self.run, self.kind = run, str(run.config["condition"])
        self.maps = self.kind in ("map", "segmentation")
        self.segmenter = Segmenter(str(run.config["segmenter"]), device) if self.kind == "segmentation" else None

    def of(self, pair: Pair) -> Image.Image:
        """The condition of a pair, RGB.

        Raises:
            ValueError: the pair has no condition and the run makes none.
            UnreadableImageError: a file is broken.
        """
        if self.kind == "canny":
            thresholds = (int(str(self.run.config[name])) for name in ("canny_low", "canny_high"))
            return canny(as_rgb(pair.original), *thresholds)
        if self.segmenter is not None:
            (ids,) = self.segmenter.maps([as_rgb(pair.original)])
            return colour_map(ids)
        if not isinstance(pair.condition, Path):
            raise ValueError(f"{pair.name} has no conditioning_image, which the run {self.run.folder.name} needs")
        return load_condition(pair.condition, self.maps)


def draw_samples(
    pipe: DiffusionPipeline, run: Run, pairs: Sequence[Pair], folder: Path, drawing: Drawing, show: bool = True
) -> list[list[Sample]]:
    """Draw the samples of every pair at the size of its condition, with a ``metadata.jsonl`` beside them.

    Every sample's noise depends on the seed, the pair's place and the sample's number alone, so that runs are compared
    on the same noise. A picture that is there already is not drawn again.

    Args:
        pipe: of the run, as :func:`~ether_diffusion.evaluation.drawing.load_run` loads it.
        run: what it was trained on.
        pairs: conditions and prompts.
        folder: where the pictures go.
        drawing: how many, and how.
        show: whether to show progress.

    Returns:
        Of every pair its samples.

    Raises:
        ValueError: a pair has no condition.
        UnreadableImageError: a file is broken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        [
            Sample(f"{index:05d}-{number}.png", pair.name, pair.prompt or "", _seed(drawing, index, number))
            for number in range(drawing.samples)
        ]
        for index, pair in enumerate(pairs)
    ]
    write_generated_metadata(folder, [sample for of_pair in samples for sample in of_pair])
    waiting = [
        (pair, sample)
        for pair, of_pair in zip(pairs, samples, strict=True)
        for sample in of_pair
        if not (folder / sample.file_name).is_file()
    ]
    conditions = Conditions(run, pipe.device)
    bar = tqdm(total=len(waiting), desc="draw", unit="picture", leave=False, disable=not show)
    for start in range(0, len(waiting), drawing.batch_size):
        part = waiting[start : start + drawing.batch_size]
        seen = [conditions.of(pair) for pair, _ in part]
        prompts, seeds = [sample.prompt or "" for _, sample in part], [int(sample.seed or 0) for _, sample in part]
        for (_, sample), image in zip(
            part, draw_under(pipe, seen, prompts, seeds, drawing, conditions.maps), strict=True
        ):
            image.save(folder / f".{sample.file_name}", "PNG")
            (folder / f".{sample.file_name}").replace(folder / sample.file_name)
            bar.update()
    return samples


def draw_under(
    pipe: DiffusionPipeline,
    conditions: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    drawing: Drawing,
    maps: bool,
) -> Iterator[Image.Image]:
    """One picture per condition, prompt and seed, at the condition's size, those of one size together."""
    start = 0
    for _, group in groupby(conditions, key=lambda image: image.size):
        part = list(group)
        span = slice(start, start + len(part))
        start += len(part)
        tensor = control_tensor(part, vae_factor(pipe), maps)
        height, width = tensor.shape[-2:]
        settings: dict[str, Any] = {
            "num_inference_steps": drawing.num_inference_steps,
            "guidance_scale": drawing.guidance_scale,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds[span]],
        }
        if hasattr(pipe, "controlnet"):
            settings |= {"image": tensor, "controlnet_conditioning_scale": drawing.strength}
            context: Any = nullcontext()
        else:
            context = controlled(pipe, tensor, drawing.strength)
        with context:
            yield from pipe(list(prompts[span]), height=height, width=width, **settings).images


def _seed(drawing: Drawing, index: int, number: int) -> int:
    return generator(drawing.seed, "sample", index, number).initial_seed()
