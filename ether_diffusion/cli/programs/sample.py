"""``ether sample RUN``: pictures from what a run learnt, at one strength or several, with the base beside them.

    ether sample runs/dog --prompts "a photo of qwe dog on a beach" --seeds 0 1 2 --strengths 0 0.5 1
    ether sample runs/dog runs/style --weights 1 0.6 --prompts "a qwe dog in zwx style"    # both at once
    ether sample runs/dog runs/cat --per_prompt --prompts "a qwe dog" "a zwx cat"          # one for each prompt

Every picture is a PNG that says in its text chunks how it was drawn; ``grid-00.png`` has a row for each strength and a
column for each seed. Strength 0 is the base; a new token that a run has learnt is the same at every strength.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.arguments import Parser
from ether_diffusion.cli.programs.request import STRENGTH, add_request, device_and_dtype, parse, request_of
from ether_diffusion.first_imports import first_imports
from ether_diffusion.reading import DamagedFileError


def main(arguments: Sequence[str] | None = None) -> None:
    """The program.

    Raises:
        SystemExit: a run or its base cannot be read, or what is asked for does not go together.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; several are drawn with together")
    add_request(parser)
    parser.add_argument("--weights", nargs="+", type=STRENGTH.of(float), help="of each run's adapter (default: 1)")
    parser.add_argument(
        "--per_prompt", action="store_true", help="the first run's adapter for the first prompt, and so on"
    )
    parser.add_argument("--control_image", type=Path, help="the condition, for a run that learnt a control")
    parser.add_argument("--output_dir", type=Path, default=Path("pictures"), help="new folder (default: %(default)s)")
    given = parse(parser, arguments)

    with first_imports():
        from ether_diffusion.pipelines.file import AdapterFileError
        from ether_diffusion.runs.record import read_run
        from ether_diffusion.runs.sample import draw_to

    weights = [1.0] * len(given.runs) if given.weights is None else given.weights
    try:
        runs = [read_run(folder) for folder in given.runs]
        request = request_of(given, runs[0], given.control_image)
        print(draw_to(given.output_dir, runs, request, weights, given.per_prompt, *device_and_dtype(given)))
    except (AdapterFileError, DamagedFileError, ImportError, OSError, ValueError) as error:
        parser.error(str(error))
