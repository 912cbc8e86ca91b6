"""The embedded default: a small drawn world, two small but real base models, and judges, all trained on it.

    pipe = ether_diffusion.playground.load()
    pipe("a red robot on a beach", guidance_scale=4).images[0]

The name ``playground`` stands for a Stable Diffusion wherever a program takes a base model, and for the judges wherever
it takes a judge; ``playground-flow`` stands for a flow transformer of Z-Image's class.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

NAME = "playground"
FLOW = "playground-flow"
GUIDANCE = {NAME: 4.0, FLOW: 3.0}
"""The embedded bases, each with the guidance scale at which it draws best, as its pipeline counts it."""
BASE = Path(__file__).parent / "base"
"""The diffusers folder of the base; the judges lie in its ``judges/clip``, ``judges/dino``, ``judges/segmenter``."""


def base_folder(name: str) -> str:
    """The folder that stands behind a base model's name: an embedded base for its name, else the name itself.

    A folder of the user's own that is called ``playground`` is reached as ``./playground``.

    Raises:
        OSError: see :func:`.flow_base.flow_folder`.
    """
    if name == FLOW:
        from ether_diffusion.playground.flow_base import flow_folder

        return str(flow_folder(BASE))
    return str(BASE) if name == NAME else name


def judge_folder(name: str, judge: str) -> str:
    """The folder behind a judge's name: the embedded ``judge`` (clip, dino, segmenter) for ``playground``."""
    return str(BASE / "judges" / judge) if name == NAME else name


def load(dtype: torch.dtype | None = None, name: str = NAME) -> DiffusionPipeline:
    """An embedded base as a diffusers pipeline, all of it in ``dtype`` (fp32 by default), on the CPU.

    Both draw 64 x 64 pixels; Z-Image's pipeline has to be told so. They draw best at the guidance scales ``GUIDANCE``,
    not at those that pipelines take where none is given.
    """
    import torch
    from diffusers import DiffusionPipeline

    pipe: DiffusionPipeline = DiffusionPipeline.from_pretrained(base_folder(name), dtype=dtype or torch.float32)
    pipe.register_to_config(_name_or_path=name)  # what adapter files and cards call the base, not a folder here
    return pipe
