"""Images from the model in training: the sample grids."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion.config import suggestion
from ether_diffusion.families.protocol import Family
from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.runs.written import note_written
from ether_diffusion.training.conditioning import Conditioning
from ether_diffusion.training.placement import present
from ether_diffusion.training.sections import SampleSection
from ether_diffusion.training.trainables import Trainable
from ether_diffusion.training.training_adapter import TrainingAdapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """What a sample grid shows.

    Attributes:
        prompt: what is asked for.
        condition: what controls it, RGB, where the model is trained with a control.
    """

    prompt: str
    condition: Image.Image | None = None


class Sampler:
    """Draws images with the pipeline in memory, and leaves the training state as it was.

    Args:
        family: of the pipeline in training.
        section: resolution, steps, guidance and scheduler of the samples; its resolution must be set.
        accelerator: for its mixed precision.
        control: what makes the pipeline take conditions, where it is trained with a control.
        training_adapter: what does not act in drawing, if anything of the kind was loaded.

    Raises:
        ValueError: diffusers has no scheduler of that name.
    """

    def __init__(
        self,
        family: Family,
        section: SampleSection,
        accelerator: Accelerator,
        control: Conditioning | None = None,
        training_adapter: TrainingAdapter | None = None,
    ) -> None:
        if section.resolution is None:
            raise ValueError("the resolution of samples is not set: give it in pixels")
        self.section = section
        self.resolution = section.resolution
        self.steps = section.num_inference_steps or family.STEPS
        self.guidance = family.GUIDANCE if section.guidance_scale is None else section.guidance_scale
        sampler = section.sampler or family.SAMPLER
        self.accelerator = accelerator
        self.control = control
        self.asleep = nullcontext if training_adapter is None else training_adapter.asleep
        self.family = family
        self.pipe = pipe = copy.copy(family.pipe)  # the same modules; from_pipe would cast them
        if sampler != "base":
            pipe.register_modules(scheduler=scheduler_class(sampler).from_config(pipe.scheduler.config))
        self.pipe.set_progress_bar_config(disable=True)
        self.encoded: dict[str, dict[str, Any]] | None = None

    def know(self, encoded: dict[str, dict[str, Any]]) -> None:
        """Draw with these encoded prompts, and without the text encoders, which may be away.

        Args:
            encoded: from every prompt that will be asked for to what
                :meth:`~ether_diffusion.families.protocol.Family.encode_for_drawing` gave.
        """
        self.encoded = encoded
        if self.family.DRAWS_ENCODED:
            for name in self.family.text_encoders:
                setattr(self.pipe, name, None)

    @torch.no_grad()
    def images(
        self, prompts: list[str], seeds: list[int], conditions: list[Image.Image] | None = None
    ) -> list[Image.Image]:
        """One image per prompt and seed, as ``pipe(prompt, generator=…)`` gives them, under conditions if any."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        seen = nullcontext({}) if self.control is None else self.control.drawing(self.pipe, conditions or [])
        encoded = None
        if self.encoded is not None:
            encoded = self.family.batch_for_drawing([self.encoded[prompt] for prompt in prompts])
        parts = [self.pipe.vae, *([] if self.family.DRAWS_ENCODED else self.family.text_encoders.values())]
        with present(self.accelerator.device, *parts), _evaluating(self.pipe):
            with self._autocast(), self.asleep(), seen as more:
                latents = self.pipe(
                    height=self.resolution,
                    width=self.resolution,
                    num_inference_steps=self.steps,
                    generator=generators,
                    output_type="latent",
                    **self.family.drawing(prompts, self.guidance, encoded),
                    **more,
                ).images
            # outside autocast, in the autoencoder's fp32: SDXL's overflows in half precision
            decoded = self.family.decode(self.family.unscaled(latents, self.resolution, self.resolution))
        images: list[Image.Image] = self.pipe.image_processor.postprocess(decoded, output_type="pil")
        return images

    def _autocast(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context


CONDITIONS = "conditions"
"""Folder of the conditions beside the sample grids."""


class SamplingInterruptedError(RuntimeError):
    """A signal arrived while a grid was drawn."""


def write_samples(
    sampler: Sampler, trainables: list[Trainable], shown: list[Shown], step: int, stop: Callable[[], bool]
) -> None:
    """Write the sample grid of a step: everything shown with every seed; at step 0 that of the base without adapter.

    Running out of memory costs the grid, not the run; ``stop`` gives it up between two images.
    """
    section = sampler.section
    folder = section.output_dir / "samples"
    seeds = range(section.validation_seed, section.validation_seed + section.num_validation_images)
    jobs = [(index, seed) for index in range(len(shown)) for seed in seeds]
    named = [(f"{number:02d}.png", index, seed) for number, (index, seed) in enumerate(jobs)]
    listing = [{"file": name, "seed": seed, **_entry(shown[index], index)} for name, index, seed in named]
    conditions_of = [index for index, each in enumerate(shown) if each.condition is not None]
    files = [folder / "prompts.json", *(folder / CONDITIONS / f"{index:02d}.png" for index in conditions_of)]
    note_written(section.output_dir, [*files, *(folder / f"step-{step:06d}" / name for name, _, _ in named)])
    for index, each in enumerate(shown):
        if each.condition is not None:
            with atomic_path(folder / CONDITIONS / f"{index:02d}.png") as temporary:
                each.condition.save(temporary, format="PNG")
    write_text(folder / "prompts.json", json.dumps(listing, indent=1))
    try:
        place, names = folder / f"step-{step:06d}", [Path(name) for name, _, _ in named]
        with atomic_path(place, beside=names) as temporary, inactive(trainables if step == 0 else []):
            temporary.mkdir()
            for name, index, seed in named:
                if stop():
                    raise SamplingInterruptedError
                each = shown[index]
                conditions = None if each.condition is None else [each.condition]
                sampler.images([each.prompt], [seed], conditions)[0].save(temporary / name)
        logger.info("samples of step %d: %s", step, place)
    except SamplingInterruptedError:
        logger.info("the samples of step %d are given up for the signal", step)
    except (torch.OutOfMemoryError, MemoryError) as error:
        logger.warning("out of memory while sampling at step %d; training goes on without this grid (%s)", step, error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def has_samples(folder: Path) -> bool:
    """Whether a step's folder has a grid: they come whole, and what others put there is none."""
    return any(re.fullmatch(r"\d+\.png", path.name) for path in folder.glob("*.png"))


def _entry(shown: Shown, index: int) -> dict[str, str]:
    """What the listing of the samples says of a prompt, and where its condition is."""
    condition = {} if shown.condition is None else {"condition": f"{CONDITIONS}/{index:02d}.png"}
    return {"prompt": shown.prompt, **condition}


def scheduler_class(name: str) -> type[diffusers.SchedulerMixin]:
    """The scheduler of diffusers with that name.

    Raises:
        ValueError: there is none.
    """
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in names:
        raise ValueError(f'diffusers has no scheduler {name!r}{suggestion(name, names)}; "base" takes the base\'s own')
    found: type[diffusers.SchedulerMixin] = getattr(diffusers, name)
    return found


@contextmanager
def _evaluating(pipe: DiffusionPipeline) -> Iterator[None]:
    """Evaluation mode, and back to what was there."""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


@contextmanager
def inactive(trainables: list[Trainable]) -> Iterator[None]:
    """The base alone, as far as what is trained can be turned off."""
    switches = [trainable.set_active for trainable in trainables if trainable.set_active is not None]
    for switch in switches:
        switch(False)
    try:
        yield
    finally:
        for switch in switches:
            switch(True)
