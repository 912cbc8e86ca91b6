"""Pictures from a trained run, loaded as a user would load it: for prompts, or under the conditions of a dataset."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from ether_diffusion import pipelines
from ether_diffusion.control.conditions import canny, colour_map, load_condition
from ether_diffusion.control.pipeline import control_tensor, controlled
from ether_diffusion.data.randomness import generator
from ether_diffusion.families.cut_prompts import cut_remarks
from ether_diffusion.families.parts import left_out
from ether_diffusion.families.registry import family_named, family_of, unused_parts
from ether_diffusion.families.settings import FamilySettings
from ether_diffusion.metrics.backbones import as_rgb
from ether_diffusion.metrics.control_tasks import Pair
from ether_diffusion.metrics.generated import Sample, write_generated_metadata
from ether_diffusion.metrics.segmentation import Segmenter
from ether_diffusion.pipelines.loaded import adapters
from ether_diffusion.pipelines.single_file import load_single_file
from ether_diffusion.playground import GUIDANCE, base_folder
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.control_drawing import Drawing
from ether_diffusion.runs.record import Run, read_run

logger = logging.getLogger(__name__)


def load_run(
    run_dir: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """A fresh pipeline over the run's base, its revision and variant, with what the run saved.

    That is an adapter of ETHER, LoRA, another adapter of peft, or all of the pipeline.

    Args:
        run_dir: the run folder.
        device: of the pipeline.
        dtype: of the base.

    Raises:
        FileNotFoundError: ``run_dir`` is not a run folder, or its weights are not there.
        AdapterFileError: the adapter file does not fit.
    """
    run = read_run(run_dir)
    pipe = load_pipeline(Base(str(run_dir)) if run.entry.saved_as == "pipeline" else run.source, device, dtype)
    if run.controlnet is not None:
        controlnet = ControlNetModel.from_pretrained(run.controlnet, dtype=dtype).to(device)
        pipe = family_of(pipe).with_controlnet(controlnet)
        pipe.set_progress_bar_config(disable=True)
    for component in run.peft_components:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(getattr(pipe, component), str(run_dir / component))
        setattr(pipe, component, adapted.get_base_model())  # diffusers asks for the class of a ControlNet
    if run.entry.saved_as == "lora" and not run.peft_components:
        pipe.load_lora_weights(str(run_dir))
    if run.entry.is_own or run.control == "encoder":
        pipelines.load(pipe, run_dir)
    return pipe


def set_strength(pipe: DiffusionPipeline, strength: float, fused: bool = True) -> None:
    """Let what :func:`load_run` has loaded act at a strength: an adapter of this library, or a LoRA.

    Args:
        pipe: a pipeline with one of them.
        strength: s of W + s ΔW.
        fused: whether an adapter of this library is written into the weights, which is faster for many pictures and in
            half precision rounds what it adds.

    Raises:
        ValueError: the pipeline has neither.
    """
    if own := adapters(pipe):
        pipelines.unfuse(pipe)
        pipelines.set_adapters(pipe, list(own), strength)
        if fused:
            pipelines.fuse(pipe)
    elif names := pipe.get_active_adapters():
        pipe.set_adapters(names, strength)
    else:
        raise ValueError("nothing in this pipeline has a strength")


def load_pipeline(
    base: Base, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """A base model without progress bar and the parts that training leaves out, with the sampler of its family.

    Raises:
        OSError: there is no such base.
        UnknownFamilyError: no family claims it.
        SingleFileError: a single file is not what its settings describe.
    """
    if base.config is not None:
        pipe = load_single_file(base.name, base_folder(base.config), dtype).to(device)
    else:
        folder = base_folder(base.name)
        index = DiffusionPipeline.load_config(folder, revision=base.revision)
        without = left_out(index, unused_parts(str(index.get("_class_name"))))
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **base.version, **without).to(device)
    sampler = family_of(pipe).SAMPLER
    if sampler != "base":
        pipe.scheduler = getattr(diffusers, sampler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_guidance(base: Base) -> float:
    """The guidance scale that a base is drawn with where none is named: an embedded base's own, else its family's.

    Raises:
        OSError: there is no such base.
        UnknownFamilyError: no family claims it.
    """
    if base.name in GUIDANCE:
        return GUIDANCE[base.name]
    index = DiffusionPipeline.load_config(base_folder(base.described_by), revision=base.revision)
    return family_named(str(index["_class_name"])).GUIDANCE


@dataclass(frozen=True)
class Asked:
    """Images to draw.

    Attributes:
        prompts: of each.
        seeds: of each one's noise.
    """

    prompts: list[str]
    seeds: list[int]

    @property
    def names(self) -> list[str]:
        """Their files, in order: ``0000.png`` and so on."""
        return [f"{number:04d}.png" for number in range(len(self.prompts))]


@torch.no_grad()
def draw(
    pipe: DiffusionPipeline,
    asked: Asked,
    batch_size: int,
    num_inference_steps: int,
    guidance_scale: float,
    encoding: FamilySettings | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[Image.Image]:
    """One picture per prompt and seed.

    Args:
        pipe: what draws.
        asked: prompts and seeds.
        batch_size: pictures at a time.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance.
        encoding: of prompts, as the run had it.
        size: height and width in pixels; the base's own resolution by default.
    """
    family = family_of(pipe, encoding)
    height, width = size or (family.native_resolution, family.native_resolution)
    for start in range(0, len(asked.prompts), batch_size):
        part = slice(start, start + batch_size)
        prompts = list(asked.prompts[part])
        yield from pipe(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in asked.seeds[part]],
            **family.drawing(prompts, guidance_scale),
        ).images


def takes_maps(run: Run) -> bool:
    """Whether the conditions that the run was trained on are semantic maps."""
    return str(run.config["condition"]) in ("map", "segmentation")


class Conditions:
    """What a run is to follow for a pair, as it saw conditions in training: given, or made from the original.

    Args:
        run: what it was trained on.
        device: where its segmenter computes, if it has one.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self.run, self.kind = run, str(run.config["condition"])
        self.maps = takes_maps(run)
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
        pipe: of the run, as :func:`~ether_diffusion.runs.drawing.load_run` loads it.
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
    for remark in cut_remarks(family_of(pipe, run.family_settings), (pair.prompt or "" for pair in pairs)):
        logger.warning("%s", remark)
    conditions = Conditions(run, pipe.device)
    bar = tqdm(total=len(waiting), desc="draw", unit="picture", leave=False, disable=not show)
    for start in range(0, len(waiting), drawing.batch_size):
        part = waiting[start : start + drawing.batch_size]
        seen = [conditions.of(pair) for pair, _ in part]
        prompts, seeds = [sample.prompt or "" for _, sample in part], [int(sample.seed or 0) for _, sample in part]
        for (_, sample), image in zip(part, draw_under(pipe, run, seen, prompts, seeds, drawing), strict=True):
            image.save(folder / f".{sample.file_name}", "PNG")
            (folder / f".{sample.file_name}").replace(folder / sample.file_name)
            bar.update()
    return samples


def draw_under(
    pipe: DiffusionPipeline,
    run: Run,
    conditions: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    drawing: Drawing,
) -> Iterator[Image.Image]:
    """One picture per condition, prompt and seed, at the condition's size, those of one size together.

    What the run was trained on says how prompts are encoded, and whether conditions are maps.
    """
    start, family = 0, family_of(pipe, run.family_settings)
    for _, group in groupby(conditions, key=lambda image: image.size):
        part = list(group)
        span = slice(start, start + len(part))
        start += len(part)
        tensor = control_tensor(part, family.divisor, takes_maps(run))
        height, width = tensor.shape[-2:]
        settings: dict[str, Any] = {
            "num_inference_steps": drawing.num_inference_steps,
            **family.drawing(prompts[span], drawing.guidance_scale),
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds[span]],
        }
        if hasattr(pipe, "controlnet"):
            settings |= {"image": tensor, "controlnet_conditioning_scale": drawing.strength}
            context: Any = nullcontext()
        else:
            context = controlled(pipe, tensor, drawing.strength)
        with context:
            yield from pipe(height=height, width=width, **settings).images


def _seed(drawing: Drawing, index: int, number: int) -> int:
    return generator(drawing.seed, "sample", index, number).initial_seed()
