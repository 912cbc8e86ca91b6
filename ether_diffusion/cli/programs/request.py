"""What is to be drawn, as the verbs that draw with runs ask for it: prompts, seeds, strengths, size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ether_diffusion.arguments import Parser
from ether_diffusion.config import FloatDtype
from ether_diffusion.ranges import AMOUNT, COUNT, SEED, Range
from ether_diffusion.reading import read_lines

if TYPE_CHECKING:
    from ether_diffusion.runs.record import Run
    from ether_diffusion.runs.sample import Request

STRENGTH = Range(-100, 100)


def add_request(parser: Parser) -> None:
    """Add the settings of what is drawn; :func:`request_of` reads them."""
    parser.add_argument("--prompts", nargs="+", help="what to draw (default: the prompts of the run's own samples)")
    parser.add_argument("--prompts_file", type=Path, help="a text file with a prompt on every line")
    parser.add_argument("--seeds", nargs="+", type=SEED.of(int), default=[0, 1, 2, 3], help="(default: 0 1 2 3)")
    parser.add_argument(
        "--strengths", nargs="+", type=STRENGTH.of(float), default=[1.0], help="of each adapter (default: 1)"
    )
    parser.add_argument("--num_inference_steps", type=COUNT.of(int), help="(default: as the run's samples)")
    parser.add_argument("--guidance_scale", type=AMOUNT.of(float), help="(default: as the run's samples)")
    parser.add_argument("--height", type=COUNT.of(int), help="pixels (default: as the run's samples)")
    parser.add_argument("--width", type=COUNT.of(int), help="pixels (default: as the run's samples)")
    parser.add_argument("--batch_size", type=COUNT.of(int), default=4, help="pictures at a time (default: %(default)s)")
    parser.add_argument("--device", help="(default: cuda where there is a GPU, cpu elsewhere)")
    parser.add_argument("--dtype", choices=get_args(FloatDtype), help="(default: bfloat16 on GPUs, float32 elsewhere)")


def device_and_dtype(given: argparse.Namespace) -> tuple[str, str]:
    """Where a command line asks to draw, and in which dtype, by its name in torch."""
    import torch

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, given.dtype or ("float32" if device == "cpu" else "bfloat16")


def parse(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line with the settings of :func:`add_request` and a new ``output_dir``.

    Raises:
        SystemExit: something is in the output_dir, it cannot be read, or prompts are given twice.
    """
    given = parser.parse_args(arguments)
    folder = given.output_dir
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        parser.error(f"{error}: name another --output_dir")
    if taken:
        parser.error(f"{folder} is there already: name another --output_dir")
    if given.prompts is not None and given.prompts_file is not None:
        parser.error("give --prompts or --prompts_file, not both")
    return given


def request_of(given: argparse.Namespace, run: Run, condition: Path | None = None) -> Request:
    """What a command line that :func:`parse` has read asks for.

    Args:
        given: the command line.
        run: whose own samples say what it leaves open.
        condition: what controls the pictures.

    Raises:
        ValueError: there is no prompt.
        OSError: the file of prompts cannot be read.
    """
    from ether_diffusion.runs.sample import Request

    prompts = given.prompts
    if given.prompts_file is not None:
        prompts = [text for _, line in read_lines(given.prompts_file) if (text := line.strip())]
    if prompts is None:
        prompts = list(dict.fromkeys(prompt["prompt"] for prompt in run.prompts)) or [run.instance_prompt or ""]
    if not any(prompts):
        raise ValueError("there is no prompt: give --prompts")
    side = int(str(run.config["resolution"]))
    return Request(
        prompts,
        list(dict.fromkeys(given.seeds)),
        list(dict.fromkeys(given.strengths)),
        given.num_inference_steps or int(str(run.config["num_inference_steps"])),
        float(str(run.config["guidance_scale"])) if given.guidance_scale is None else given.guidance_scale,
        given.height or side,
        given.width or side,
        given.batch_size,
        condition,
    )
