"""Pictures from what runs learnt, at one strength or several, with the base beside them.

Every picture is a PNG that says in its text chunks how it was drawn; ``grid-00.png`` has a row for each strength and a
column for each seed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from ether_diffusion import pipelines
from ether_diffusion.control.conditions import load_condition
from ether_diffusion.families.cut_prompts import cut_remarks
from ether_diffusion.families.registry import family_of
from ether_diffusion.files import write_text
from ether_diffusion.images import load_image
from ether_diffusion.page.pictures import picture_grid, save_picture
from ether_diffusion.page.text import counted
from ether_diffusion.pipelines.file import public_name
from ether_diffusion.pipelines.loaded import adapters
from ether_diffusion.runs.control_drawing import Drawing
from ether_diffusion.runs.drawing import draw_under, load_run, takes_maps
from ether_diffusion.runs.record import Run

logger = logging.getLogger(__name__)

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


def draw_to(
    folder: Path,
    runs: Sequence[Run],
    request: Request,
    weights: Sequence[float],
    per_prompt: bool,
    device: str,
    dtype: str,
) -> str:
    """Draw a request: the pictures, a grid for each prompt, and ``prompts.txt``.

    Args:
        folder: a new one.
        runs: whose adapters draw.
        request: what is drawn.
        weights: strength of each adapter, which the strengths of the request multiply.
        per_prompt: whether prompt i has the i-th run's adapter alone.
        device: where to draw.
        dtype: of the base, by its name in torch.

    Returns:
        What was written, in a line.

    Raises:
        AdapterFileError, OSError: a run or its base cannot be read.
        ValueError: what is asked for does not go together.
    """
    check_request(runs, request, weights, per_prompt)
    pipe = load_runs(runs, device, getattr(torch, dtype))
    for remark in cut_remarks(family_of(pipe, runs[0].family_settings), request.prompts):
        logger.warning("%s", remark)
    total = len(request.prompts) * len(request.seeds) * len(request.strengths)
    grids: dict[int, dict[float, list[Image.Image]]] = {}
    bar = tqdm(total=total, desc="draw", unit="picture")
    for drawn in draw_request(pipe, runs, request, weights, per_prompt):
        write_picture(drawn, request, dtype, folder)
        grids.setdefault(drawn.number, {}).setdefault(drawn.strength, []).append(drawn.image)
        bar.update()
    bar.close()
    for number, rows in grids.items():
        titles = [("base" if not strength else f"strength {strength:g}", images) for strength, images in rows.items()]
        heads = [f"seed {seed}" for seed in request.seeds]
        save_picture(picture_grid(titles, heads), folder / f"grid-{number:02d}.png")
    write_text(folder / "prompts.txt", "".join(f"{prompt}\n" for prompt in request.prompts))
    return f"{counted(total, 'picture')} and {counted(len(grids), 'grid')} in {folder.resolve()}"
