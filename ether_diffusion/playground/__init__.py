"""The embedded default: a small drawn world, and a small but real Stable Diffusion with its judges, trained on it.

    pipe = ether_diffusion.playground.load()
    pipe("a red robot on a beach", guidance_scale=4).images[0]

The name ``playground`` stands for it wherever a program takes a base model or a judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

NAME = "playground"
BASE = Path(__file__).parent / "base"
"""The diffusers folder of the base; the judges lie in its ``judges/clip``, ``judges/dino``, ``judges/segmenter``."""


def base_folder(name: str) -> str:
    """The folder that stands behind a base model's name: the embedded base for ``playground``, else the name itself.

    A folder of the user's own that is called ``playground`` is reached as ``./playground``.
    """
    return str(BASE) if name == NAME else name


def judge_folder(name: str, judge: str) -> str:
    """The folder behind a judge's name: the embedded ``judge`` (clip, dino, segmenter) for ``playground``."""
    return str(BASE / "judges" / judge) if name == NAME else name


def load(dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """The base as a diffusers pipeline for 64 x 64 pixels, all of it in ``dtype`` (fp32 by default), on the CPU.

    It was trained for guidance scales near 4, not the 7.5 that pipelines take where none is given.
    """
    import torch
    from diffusers import DiffusionPipeline

    pipe: StableDiffusionPipeline = DiffusionPipeline.from_pretrained(BASE, dtype=dtype or torch.float32)
    return pipe
