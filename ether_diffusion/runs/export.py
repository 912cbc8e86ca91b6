"""What a run, or a pipeline with adapters, learnt as one exact LoRA file, for every tool that reads LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from ether_diffusion import export
from ether_diffusion.config import FloatDtype
from ether_diffusion.export.factors import ExportError
from ether_diffusion.export.lora import Exported
from ether_diffusion.runs.drawing import load_run
from ether_diffusion.runs.lora import told_of
from ether_diffusion.runs.record import read_run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def export_lora(
    pipe_or_run: DiffusionPipeline | str | Path,
    path: str | Path,
    format: str = "diffusers",
    name: str | Sequence[str] | None = None,
    strength: float | Sequence[float] = 1.0,
    dtype: FloatDtype = "float16",
    base_dtype: FloatDtype = "float32",
) -> Exported:
    """Write adapters as one LoRA file that does exactly what they do on their base, W + Σ s ΔW.

    The file is read by diffusers' own loader before it gets its name, and compared with the adapter layer by layer.

    Args:
        pipe_or_run: a pipeline with loaded adapters, neither fused nor quantised; or a run folder, whose base is
            loaded.
        path: of the new file, which ends in .safetensors.
        format: whose names the keys are: diffusers; kohya (SD and SDXL: kohya, Forge, ComfyUI and diffusers read it);
            comfyui; original (the layers of the authors' code, where q, k and v are one).
        name: the adapter, or several, whose updates add up; those that are loaded where none is named.
        strength: s of each, or of all.
        dtype: of the file: float16 costs some 5e-4 of the effect, bfloat16 2e-3 to 5e-3, float32 nothing.
        base_dtype: in which the base of a run is loaded. A base that is published in bfloat16 loses nothing by it and
            takes half the memory.

    Returns:
        What was written: layers, rank, bytes, and the largest difference from the adapter.

    Raises:
        ExportError: the adapter has no low rank (Naive), the base cannot be read, the family has no such format, or
            the file does not do what the adapter does; nothing is written then.
        FileExistsError: the path exists.
        FileNotFoundError: there is no such run.
        RuntimeError: adapters are fused.
    """
    if not isinstance(pipe_or_run, str | Path):
        return export.lora.export_lora(pipe_or_run, path, format, name, strength, dtype)
    if base_dtype not in get_args(FloatDtype):
        raise ExportError(f"base_dtype {base_dtype!r} is none of {', '.join(get_args(FloatDtype))}")
    run = read_run(Path(pipe_or_run))
    if not run.entry.is_own:
        raise ExportError(f"{run.folder} was trained with method={run.method}: what is exported is ETHER and ETHER+")
    if Path(path).exists():  # before the base is loaded
        raise FileExistsError(f"{path} is there already: name another file, or remove it")
    pipe = load_run(run.folder, dtype=getattr(torch, base_dtype))
    return export.lora.export_lora(pipe, path, format, name, strength, dtype, told_of(run), run.base)
