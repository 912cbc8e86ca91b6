"""Pictures from a trained run, loaded as a user would load it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

from ether_diffusion import pipelines
from ether_diffusion.playground import base_folder
from ether_diffusion.runs.record import read_run
from ether_diffusion.training.base_model import is_xl


def load_run(run_dir: Path, device: torch.device | str = "cpu") -> DiffusionPipeline:
    """A fresh pipeline over the run's base with what the run saved: ETHER, LoRA, another adapter of peft, or all of it.

    Raises:
        FileNotFoundError: ``run_dir`` is not a run folder, or its weights are not there.
        AdapterFileError: the adapter file does not fit.
    """
    run = read_run(run_dir)
    pipe = load_pipeline(str(run_dir) if run.entry.saved_as == "pipeline" else run.base, device)
    if run.controlnet is not None:
        controlnet = ControlNetModel.from_pretrained(run.controlnet, dtype=torch.float32).to(device)
        kind = StableDiffusionXLControlNetPipeline if is_xl(pipe) else StableDiffusionControlNetPipeline
        pipe = kind.from_pipe(pipe, controlnet=controlnet)
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


def load_pipeline(name: str, device: torch.device | str = "cpu") -> DiffusionPipeline:
    """A base model in fp32, without safety checker and progress bar, with the sampler of DreamBooth's evaluations."""
    pipe = DiffusionPipeline.from_pretrained(base_folder(name), dtype=torch.float32).to(device)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    pipe: DiffusionPipeline, asked: Asked, batch_size: int, num_inference_steps: int, guidance_scale: float
) -> Iterator[Image.Image]:
    """One picture per prompt and seed, at the pipeline's own resolution."""
    for start in range(0, len(asked.prompts), batch_size):
        part = slice(start, start + batch_size)
        yield from pipe(
            asked.prompts[part],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in asked.seeds[part]],
        ).images
