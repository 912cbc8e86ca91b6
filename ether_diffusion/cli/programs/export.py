"""``ether export RUN OUT``: what a run learnt as one exact LoRA file, for every tool that reads LoRA.

``ether.export_lora`` is the same from Python, for a run or for the adapters of a pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ether_diffusion.arguments import Parser
from ether_diffusion.cli.programs.request import STRENGTH
from ether_diffusion.config import FloatDtype, LoraFormat
from ether_diffusion.first_imports import first_imports
from ether_diffusion.reading import DamagedFileError


def main(arguments: Sequence[str] | None = None) -> None:
    """The program.

    Raises:
        SystemExit: the run or its base cannot be read, the output exists, or the file would not be the adapter.
    """
    formats, dtypes = get_args(LoraFormat), get_args(FloatDtype)
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("output", type=Path, help="the LoRA file to write, .safetensors")
    parser.add_argument("--format", choices=formats, default="diffusers", help="whose names (default: %(default)s)")
    parser.add_argument("--strength", type=STRENGTH.of(float), default=1.0, help="s of W + s ΔW (default: %(default)s)")
    parser.add_argument("--dtype", choices=dtypes, default="float16", help="(default: %(default)s)")
    parser.add_argument(
        "--base_dtype",
        choices=dtypes,
        default="float32",
        help="in which the base is loaded; bfloat16 takes half the memory (default: %(default)s)",
    )
    parser.add_argument("--page", type=Path, help="write a page of pictures of both, of the run's prompts")
    given = parser.parse_args(arguments)

    with first_imports():
        from ether_diffusion.pipelines.file import AdapterFileError
        from ether_diffusion.runs.comparison import check_comparable, write_comparison
        from ether_diffusion.runs.export import export_lora

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
