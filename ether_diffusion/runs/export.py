"""``ether export RUN OUT``: what a run learnt as one exact LoRA file, for every tool that reads LoRA.

``ether.export_lora`` is the same from Python, for a run or for the adapters of a pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from ether_diffusion import export
from ether_diffusion.arguments import Parser
from ether_diffusion.export.factors import ExportError
from ether_diffusion.export.lora import Dtype, Exported
from ether_diffusion.families.registry import FAMILIES
from ether_diffusion.pipelines.file import AdapterFileError
from ether_diffusion.ranges import Range
from ether_diffusion.reading import DamagedFileError
from ether_diffusion.runs.comparison import check_comparable, write_comparison
from ether_diffusion.runs.drawing import load_run
from ether_diffusion.runs.lora import told_of
from ether_diffusion.runs.record import read_run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STRENGTH = Range(-100, 100)
FORMATS = tuple(dict.fromkeys(kind for family in FAMILIES.values() for kind in family.LORA_FORMATS))


def export_lora(
    pipe_or_run: DiffusionPipeline | str | Path,
    path: str | Path,
    format: str = "diffusers",
    name: str | Sequence[str] | None = None,
    strength: float | Sequence[float] = 1.0,
    dtype: Dtype = "float16",
    base_dtype: Dtype = "float32",
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
    if base_dtype not in get_args(Dtype):
        raise ExportError(f"base_dtype {base_dtype!r} is none of {', '.join(get_args(Dtype))}")
    run = read_run(Path(pipe_or_run))
    if not run.entry.is_own:
        raise ExportError(f"{run.folder} was trained with method={run.method}: what is exported is ETHER and ETHER+")
    if Path(path).exists():  # before the base is loaded
        raise FileExistsError(f"{path} is there already: name another file, or remove it")
    pipe = load_run(run.folder, dtype=getattr(torch, base_dtype))
    return export.lora.export_lora(pipe, path, format, name, strength, dtype, told_of(run), run.base)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program.

    Raises:
        SystemExit: the run or its base cannot be read, the output exists, or the file would not be the adapter.
    """
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("output", type=Path, help="the LoRA file to write, .safetensors")
    parser.add_argument("--format", choices=FORMATS, default="diffusers", help="whose names (default: %(default)s)")
    parser.add_argument("--strength", type=STRENGTH.of(float), default=1.0, help="s of W + s ΔW (default: %(default)s)")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float16", help="(default: %(default)s)")
    parser.add_argument(
        "--base_dtype",
        choices=get_args(Dtype),
        default="float32",
        help="in which the base is loaded; bfloat16 takes half the memory (default: %(default)s)",
    )
    parser.add_argument("--page", type=Path, help="write a page of pictures of both, of the run's prompts")
    given = parser.parse_args(arguments)
    try:
        if given.page is not None:
            check_comparable(given.run, given.format)
        written = export_lora(
            given.run, given.output, given.format, None, given.strength, given.dtype, given.base_dtype
        )
        print(written)
        if given.page is not None:
            worst = write_comparison(given.run, given.output, given.page, given.strength)
            print(f"{given.page}: adapter and LoRA differ by {worst.largest} of 255 at most")
    except (AdapterFileError, DamagedFileError, ImportError, OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
