"""``ether sample RUN``: pictures from what a run learnt, at one strength or several, with the base beside them.

    ether sample runs/dog --prompts "a photo of qwe dog on a beach" --seeds 0 1 2 --strengths 0 0.5 1
    ether sample runs/dog runs/style --weights 1 0.6 --prompts "a qwe dog in zwx style"    # both at once
    ether sample runs/dog runs/cat --per_prompt --prompts "a qwe dog" "a zwx cat"          # one for each prompt

Every picture is a PNG that says in its text chunks how it was drawn; ``grid-00.png`` has a row for each strength and a
column for each seed. Strength 0 is the base; a new token that a run has learnt is the same at every strength.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from ether_diffusion import pipelines
from ether_diffusion.arguments import Parser
from ether_diffusion.control.conditions import load_condition
from ether_diffusion.export.lora import Dtype
from ether_diffusion.families.cut_prompts import cut_remarks
from ether_diffusion.families.registry import family_of
from ether_diffusion.files import write_text
from ether_diffusion.images import load_image
from ether_diffusion.page.pictures import picture_grid, save_picture
from ether_diffusion.page.text import counted
from ether_diffusion.pipelines.file import AdapterFileError, public_name
from ether_diffusion.pipelines.loaded import adapters
from ether_diffusion.ranges import AMOUNT, COUNT, SEED, Range
from ether_diffusion.reading import DamagedFileError, read_lines
from ether_diffusion.runs.drawing import Drawing, draw_under, load_run, takes_maps
from ether_diffusion.runs.record import Run, read_run

logger = logging.getLogger(__name__)

STRENGTH = Range(-100, 100)
NUMBERED = "{:02d}-seed{}-strength{:g}.png"


@dataclass(frozen=True)
class Request:
    """What is to be drawn.

    Attributes:
        prompts: each drawn with every seed at every strength.
        seeds: of the noise.
        strengths: s of W + s ΔW, of all adapters together.
        steps: denoising steps.
        guidance: classifier-free guidance, as the base's pipeline counts it.
        height, width: in pixels.
        batch_size: pictures at a time.
        condition: what controls the pictures, of runs that learnt a control.
    """

    prompts: list[str]
    seeds: list[int]
    strengths: list[float]
    steps: int
    guidance: float
    height: int
    width: int
    batch_size: int
    condition: Path | None = None


@dataclass(frozen=True)
class Drawn:
    """One picture, and how it came about: ``acting`` are the runs whose adapters act, with their weights."""

    acting: list[tuple[Run, float]]
    number: int
    prompt: str
    seed: int
    strength: float
    image: Image.Image


def check_request(runs: Sequence[Run], request: Request, weights: Sequence[float], per_prompt: bool) -> None:
    """See that the request can be drawn, before a base is loaded.

    Raises:
        ValueError: the runs cannot be drawn with together, the request does not go with them, or the condition has
            another shape than the pictures.
        UnreadableImageError: the condition is broken.
    """
    first = runs[0]
    name, own = first.folder.name, all(run.entry.is_own and run.control is None for run in runs)
    check_one_base(runs)
    if len(runs) > 1 and not own:
        raise ValueError("several runs must all be adapters of ETHER, ETHER+ or Naive without a control: give one run")
    if len(weights) != len(runs):
        raise ValueError(f"{len(runs)} runs and {len(weights)} weights: give one each")
    if per_prompt and len(request.prompts) != len(runs):
        raise ValueError(f"{len(runs)} runs and {len(request.prompts)} prompts: per_prompt needs a prompt for each run")
    if not own and {*request.strengths, *weights} != {1.0}:
        kind = "has a control" if first.control else f"is {first.method_name}"
        raise ValueError(f"{name} {kind}, which is drawn at strength 1: leave out strengths and weights")
    if request.condition is None and first.control is not None:
        raise ValueError(f"{name} learnt a control: give the condition by --control_image")
    if request.condition is not None and first.control is None:
        raise ValueError(f"{name} learnt no control: leave out --control_image")
    if request.condition is not None:
        image = load_image(request.condition)
        if abs(image.width * request.height - image.height * request.width) > 0.02 * image.height * request.width:
            raise ValueError(
                f"{request.condition} is {image.width} x {image.height} and the picture {request.width} x "
                f"{request.height}: give --width and --height of its shape"
            )


def _encoding(run: Run) -> str:
    """How a run's prompts are encoded, in words."""
    settings = run.family_settings
    return f"prompt_chunks={settings.prompt_chunks}, max_sequence_length={settings.max_sequence_length}"


def check_one_base(runs: Sequence[Run]) -> None:
    """See that runs can be drawn with one base, and one encoding of prompts.

    Raises:
        ValueError: one was trained on another base than the first, or encodes prompts in another way.
    """
    first, *others = runs
    name = first.folder.name
    for run in others:
        if run.source != first.source:
            raise ValueError(
                f"{run.folder.name} was trained on {run.source}, {name} on {first.source}: give runs on one base"
            )
        if _encoding(run) != _encoding(first):
            raise ValueError(
                f"{run.folder.name} encodes prompts with {_encoding(run)}, {name} with {_encoding(first)}: draw with "
                "one of them at a time"
            )


def load_runs(runs: Sequence[Run], device: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline with what these runs learnt; several adapters are named by their place: "0", "1", ….

    Raises:
        FileNotFoundError: the weights of a run are missing.
        AdapterFileError: an adapter does not fit the base.
    """
    pipe = load_run(runs[0].folder, device, dtype)
    if len(runs) > 1:
        pipelines.unload(pipe)
        for number, run in enumerate(runs):
            pipelines.load(pipe, run.folder, str(number))
    return pipe


def draw_request(
    pipe: DiffusionPipeline, runs: Sequence[Run], request: Request, weights: Sequence[float], per_prompt: bool
) -> Iterator[Drawn]:
    """Every picture of a request.

    Args:
        pipe: of :func:`load_runs`.
        runs: whose adapters it has.
        request: what is to be drawn; see :func:`check_request`.
        weights: strength of each adapter, which the strengths of the request multiply.
        per_prompt: whether prompt i has the i-th run's adapter alone.
    """
    names = list(adapters(pipe))
    for strength in request.strengths:
        for number, prompt in enumerate(request.prompts):
            chosen = slice(number, number + 1) if per_prompt else slice(None)
            acting = list(zip(runs, weights, strict=True))[chosen]
            if names:
                pipelines.set_adapters(pipe, names[chosen], [strength * weight for _, weight in acting])
            for start in range(0, len(request.seeds), request.batch_size):
                seeds = request.seeds[start : start + request.batch_size]
                for seed, image in zip(seeds, _images(pipe, runs[0], request, prompt, seeds), strict=True):
                    yield Drawn(acting, number, prompt, seed, strength, image)


@torch.no_grad()
def _images(pipe: DiffusionPipeline, run: Run, request: Request, prompt: str, seeds: list[int]) -> list[Image.Image]:
    if request.condition is not None:
        maps = takes_maps(run)
        condition = load_condition(request.condition, maps)
        condition = condition.resize((request.width, request.height), _resampling(maps))
        drawing = Drawing(
            batch_size=request.batch_size,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            strength=1.0,
        )
        return list(draw_under(pipe, run, [condition] * len(seeds), [prompt] * len(seeds), seeds, drawing))
    images: list[Image.Image] = pipe(
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **family_of(pipe, run.family_settings).drawing([prompt] * len(seeds), request.guidance),
    ).images
    return images


def _resampling(maps: bool) -> Image.Resampling:
    """Maps keep their colours."""
    return Image.Resampling.NEAREST if maps else Image.Resampling.LANCZOS


def write_picture(drawn: Drawn, request: Request, dtype: str, folder: Path) -> None:
    """Write one PNG that says how it was drawn."""
    run = drawn.acting[0][0]
    facts: dict[str, object] = {
        "prompt": drawn.prompt,
        "seed": drawn.seed,
        "strength": drawn.strength,
        "adapters": [{"run": each.folder.name, "weight": weight} for each, weight in drawn.acting],
        "control_image": None if request.condition is None else request.condition.name,
        **drawing_facts(request, run, dtype),
    }
    save_picture(drawn.image, folder / NUMBERED.format(drawn.number, drawn.seed, drawn.strength), facts)


def drawing_facts(request: Request, run: Run, dtype: str) -> dict[str, object]:
    """How every picture of a request is drawn with a run's base, for the text chunks of its PNG."""
    base, number = run.source, run.family_settings.prompt_chunks
    return {
        "base": {"name": public_name(base.name), **base.version},
        "dtype": dtype,
        "steps": request.steps,
        "guidance_scale": request.guidance,
        "size": f"{request.width}x{request.height}",
        **({"prompt_chunks": str(number)} if number > 1 else {}),
        "ether_diffusion": version("ether-diffusion"),
    }


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
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=get_args(Dtype), help="(default: bfloat16 on GPUs, float32 elsewhere)")


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
    given = parser.parse_args(arguments)
    try:
        _main(given)
    except (AdapterFileError, DamagedFileError, ImportError, OSError, ValueError) as error:
        parser.error(str(error))


def _main(given: argparse.Namespace) -> None:
    check_new(given.output_dir)
    weights = [1.0] * len(given.runs) if given.weights is None else given.weights
    dtype = dtype_of(given)
    runs = [read_run(folder) for folder in given.runs]
    request = request_of(given, runs[0], given.control_image)
    check_request(runs, request, weights, given.per_prompt)
    pipe = load_runs(runs, given.device, getattr(torch, dtype))
    for remark in cut_remarks(family_of(pipe, runs[0].family_settings), request.prompts):
        logger.warning("%s", remark)
    total = len(request.prompts) * len(request.seeds) * len(request.strengths)
    grids: dict[int, dict[float, list[Image.Image]]] = {}
    bar = tqdm(total=total, desc="draw", unit="picture")
    for drawn in draw_request(pipe, runs, request, weights, given.per_prompt):
        write_picture(drawn, request, dtype, given.output_dir)
        grids.setdefault(drawn.number, {}).setdefault(drawn.strength, []).append(drawn.image)
        bar.update()
    bar.close()
    for number, rows in grids.items():
        titles = [("base" if not strength else f"strength {strength:g}", images) for strength, images in rows.items()]
        heads = [f"seed {seed}" for seed in request.seeds]
        save_picture(picture_grid(titles, heads), given.output_dir / f"grid-{number:02d}.png")
    write_text(given.output_dir / "prompts.txt", "".join(f"{prompt}\n" for prompt in request.prompts))
    print(f"{counted(total, 'picture')} and {counted(len(grids), 'grid')} in {given.output_dir.resolve()}")


def check_new(folder: Path) -> None:
    """See that a folder is not there, or empty.

    Raises:
        FileExistsError: something is there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already: name another --output_dir")


def dtype_of(given: argparse.Namespace) -> str:
    """The dtype that a command line asks for, by its name in torch."""
    return str(given.dtype or ("float32" if given.device == "cpu" else "bfloat16"))


def request_of(given: argparse.Namespace, run: Run, condition: Path | None = None) -> Request:
    """What a command line with the settings of :func:`add_request` asks for.

    Args:
        given: the command line.
        run: whose own samples say what it leaves open.
        condition: what controls the pictures.

    Raises:
        ValueError: there is no prompt, or prompts are given twice.
        OSError: the file of prompts cannot be read.
    """
    if given.prompts is not None and given.prompts_file is not None:
        raise ValueError("give --prompts or --prompts_file, not both")
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


if __name__ == "__main__":
    main()
