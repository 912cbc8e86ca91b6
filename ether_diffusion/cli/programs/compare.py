"""``ether compare RUN RUN …``: runs, adapter files and LoRA files side by side, drawn from the same prompts and seeds.

    ether compare runs/dog runs/dog-lora --prompts "a qwe dog in snow" --seeds 0 1 2 3
    ether compare runs/dog runs/dog/best dog.safetensors          # last step, best step, exported LoRA
    ether compare runs/dog --strengths 0.5 0.75 1                 # one run at several strengths

The new folder has ``compare.html``, one page that opens offline, and the PNGs in ``pictures``. With ``#blind`` after
its name the page opens without names; the choices that it saves are counted by ``ether votes``. The first RUN is a run
folder: it says the base and, where they are not given, prompts and settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ether_diffusion.arguments import Parser
from ether_diffusion.cli.programs.request import add_request, device_and_dtype, parse, request_of
from ether_diffusion.first_imports import first_imports
from ether_diffusion.reading import DamagedFileError


def main(arguments: Sequence[str] | None = None) -> None:
    """The program.

    Raises:
        SystemExit: a run, file or base cannot be read, or they cannot be compared.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folder; after the first also a .safetensors file of an adapter or LoRA, or a folder with one",
    )
    add_request(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("compared"), help="new folder (default: %(default)s)")
    given = parse(parser, arguments)

    with first_imports():
        from ether_diffusion.evaluation.compare.columns import first_run, read_sources
        from ether_diffusion.evaluation.compare.page import draw_page
        from ether_diffusion.pipelines.file import AdapterFileError

    try:
        sources = read_sources(given.runs)
        run = first_run(sources)
        request = request_of(given, run)
        request = replace(request, prompts=list(dict.fromkeys(request.prompts)))
        page = draw_page(sources, run, request, *device_and_dtype(given), given.output_dir)
    except (AdapterFileError, DamagedFileError, ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(page.resolve())
