"""``ether sample RUN``: pictures from what a run learnt, at one strength or several, with the base beside them.

    ether sample runs/dog --prompts "a photo of qwe dog on a beach" --seeds 0 1 2 --strengths 0 0.5 1
    ether sample runs/dog runs/style --weights 1 0.6 --prompts "a qwe dog in zwx style"    # both at once
    ether sample runs/dog runs/cat --per_prompt --prompts "a qwe dog" "a zwx cat"          # one for each prompt

Every picture is a PNG that says in its text chunks how it was drawn; ``grid-00.png`` has a row for each strength and a
column for each seed. Strength 0 is the base.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ether_diffusion import pipelines
from ether_diffusion.arguments import Parser
from ether_diffusion.control.conditions import load_condition
from ether_diffusion.families.registry import family_of
from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.page.pictures import picture_grid, save_picture
from ether_diffusion.pipelines.file import AdapterFileError, public_name
from ether_diffusion.pipelines.loaded import adapters
from ether_diffusion.ranges import AMOUNT, COUNT, SEED, Range
from ether_diffusion.reading import DamagedFileError, read_lines
from ether_diffusion.runs.drawing import Drawing, draw_under, load_run
from ether_diffusion.runs.record import Run, read_run

STRENGTH = Range(-100, 100)
NUMBERED = "{:02d}-seed{}-strength{:g}.png"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Wish:
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


def load_runs(folders: Sequence[Path], device: str, dtype: torch.dtype) -> tuple[DiffusionPipeline, list[Run]]:
    """A pipeline with the adapters of these runs, named by their place: "0", "1", ….

    Raises:
        FileNotFoundError: there is no such run, or its weights are missing.
        AdapterFileError: an adapter does not fit the base.
        ValueError: the runs have other bases, or several are given and one is no adapter of this library.
    """
    runs = [read_run(folder) for folder in folders]
    first = runs[0]
    for run in runs[1:]:
        if run.source != first.source:
            raise ValueError(
                f"{run.folder.name} was trained on {run.source}, {first.folder.name} on {first.source}: what is drawn "
                "with together needs one base"
            )
    if len(runs) > 1 and (others := [run for run in runs if not run.entry.is_own or run.control is not None]):
        raise ValueError(
            f"{others[0].folder.name} is {others[0].method_name}"
            f"{' with a control' if others[0].control else ''}: several runs are drawn with together, or one for each "
            "prompt, if all are adapters of ETHER, ETHER+ or Naive without a control"
        )
    pipe = load_run(first.folder, device, dtype)
    if len(runs) > 1:
        pipelines.unload(pipe)
        for number, run in enumerate(runs):
            pipelines.load(pipe, run.folder, str(number))
    return pipe, runs


def draw_wish(
    pipe: DiffusionPipeline, runs: Sequence[Run], wish: Wish, weights: Sequence[float], per_prompt: bool
) -> Iterator[Drawn]:
    """Every picture of the wish.

    Args:
        pipe: of :func:`load_runs`.
        runs: whose adapters it has.
        wish: what is to be drawn.
        weights: strength of each adapter, which the strengths of the wish multiply.
        per_prompt: whether prompt i has the i-th run's adapter alone.

    Raises:
        ValueError: another number of prompts than of runs, or a strength that a method cannot have.
    """
    if per_prompt and len(wish.prompts) != len(runs):
        raise ValueError(f"per_prompt: {len(runs)} runs and {len(wish.prompts)} prompts; give a prompt for each run")
    whole = not runs[0].entry.is_own and runs[0].method != "none"
    if whole and {*wish.strengths, *weights} != {1.0}:
        raise ValueError(
            f"{runs[0].folder.name} is {runs[0].method_name}, and strengths are for adapters of this library: leave "
            "them out, and weights"
        )
    control = runs[0].control
    if control is not None and {*wish.strengths, *weights} != {1.0}:
        raise ValueError(f"{runs[0].folder.name} learnt a control, which is drawn at strength 1: leave strengths out")
    if (control is None) != (wish.condition is None):
        needs = "needs --control_image" if control else "learnt no control: leave out --control_image"
        raise ValueError(f"{runs[0].folder.name} {needs}")
    names = [str(number) for number in range(len(runs))] if len(runs) > 1 else list(adapters(pipe))
    for strength in wish.strengths:
        for number, prompt in enumerate(wish.prompts):
            if names and not whole:
                chosen = [names[number]] if per_prompt else names
                own = [weights[number]] if per_prompt else weights
                pipelines.set_adapters(pipe, chosen, [strength * weight for weight in own])
            acting = list(zip(runs, weights, strict=True))
            acting = [acting[number]] if per_prompt else acting
            off = nullcontext() if strength or whole else pipelines.disabled(pipe)
            with off:
                for start in range(0, len(wish.seeds), wish.batch_size):
                    seeds = wish.seeds[start : start + wish.batch_size]
                    images = _images(pipe, runs[0], wish, prompt, seeds)
                    for seed, image in zip(seeds, images, strict=True):
                        yield Drawn(acting, number, prompt, seed, strength, image)


@torch.no_grad()
def _images(pipe: DiffusionPipeline, run: Run, wish: Wish, prompt: str, seeds: list[int]) -> list[Image.Image]:
    if wish.condition is not None:
        maps = str(run.config["condition"]) in ("map", "segmentation")
        condition = load_condition(wish.condition, maps)
        if abs(condition.width * wish.height - condition.height * wish.width) > 0.02 * condition.height * wish.width:
            raise ValueError(
                f"{wish.condition} is {condition.width} x {condition.height} and the picture {wish.width} x "
                f"{wish.height}: give --width and --height of its shape"
            )
        condition = condition.resize((wish.width, wish.height), _resampling(maps))
        drawing = Drawing(
            batch_size=wish.batch_size, num_inference_steps=wish.steps, guidance_scale=wish.guidance, strength=1.0
        )
        return list(draw_under(pipe, [condition] * len(seeds), [prompt] * len(seeds), seeds, drawing, maps))
    images: list[Image.Image] = pipe(
        height=wish.height,
        width=wish.width,
        num_inference_steps=wish.steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **family_of(pipe).drawing([prompt] * len(seeds), wish.guidance),
    ).images
    return images


def _resampling(maps: bool) -> Image.Resampling:
    """Maps keep their colours."""
    return Image.Resampling.NEAREST if maps else Image.Resampling.LANCZOS


def write_picture(drawn: Drawn, wish: Wish, dtype: str, folder: Path) -> Path:
    """Write one PNG that says how it was drawn, and return its path."""
    base = drawn.acting[0][0].source
    facts: dict[str, object] = {
        "prompt": drawn.prompt,
        "seed": drawn.seed,
        "strength": drawn.strength,
        "adapters": [{"run": run.folder.name, "weight": weight} for run, weight in drawn.acting],
        "base": {"name": public_name(base.name), **base.version},
        "control_image": None if wish.condition is None else wish.condition.name,
        "dtype": dtype,
        "steps": wish.steps,
        "guidance_scale": wish.guidance,
        "size": f"{wish.width}x{wish.height}",
        "ether_diffusion": version("ether-diffusion"),
    }
    chunks = PngInfo()
    for key, value in facts.items():
        chunks.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    path = folder / NUMBERED.format(drawn.number, drawn.seed, drawn.strength)
    with atomic_path(path) as temporary:
        drawn.image.save(temporary, "PNG", pnginfo=chunks)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """The program.

    Raises:
        SystemExit: a run or its base cannot be read, or what is asked for does not go together.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; several are drawn with together")
    parser.add_argument("--prompts", nargs="+", help="what to draw (default: the prompts of the run's own samples)")
    parser.add_argument("--prompts_file", type=Path, help="a text file with a prompt on every line")
    parser.add_argument("--seeds", nargs="+", type=SEED.of(int), default=[0, 1, 2, 3], help="(default: 0 1 2 3)")
    parser.add_argument(
        "--strengths",
        nargs="+",
        type=STRENGTH.of(float),
        default=[1.0],
        help="a row for each; 0 is the base (default: 1)",
    )
    parser.add_argument("--weights", nargs="+", type=STRENGTH.of(float), help="of each run's adapter (default: 1)")
    parser.add_argument(
        "--per_prompt", action="store_true", help="the first run's adapter for the first prompt, and so on"
    )
    parser.add_argument("--control_image", type=Path, help="the condition, for a run that learnt a control")
    parser.add_argument("--output_dir", type=Path, default=Path("pictures"), help="new folder (default: %(default)s)")
    parser.add_argument("--num_inference_steps", type=COUNT.of(int), help="(default: as the run's samples)")
    parser.add_argument("--guidance_scale", type=AMOUNT.of(float), help="(default: as the run's samples)")
    parser.add_argument("--height", type=COUNT.of(int), help="pixels (default: as the run's samples)")
    parser.add_argument("--width", type=COUNT.of(int), help="pixels (default: as the run's samples)")
    parser.add_argument("--batch_size", type=COUNT.of(int), default=4, help="pictures at a time (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="(default: bfloat16 on GPUs, float32 elsewhere)")
    given = parser.parse_args(arguments)
    try:
        _main(given)
    except (AdapterFileError, DamagedFileError, ImportError, OSError, ValueError) as error:
        parser.error(str(error))


def _main(given: argparse.Namespace) -> None:
    if given.output_dir.exists() and (not given.output_dir.is_dir() or any(given.output_dir.iterdir())):
        raise FileExistsError(f"{given.output_dir} is there already: name another --output_dir")
    weights = [1.0] * len(given.runs) if given.weights is None else given.weights
    if len(weights) != len(given.runs):
        raise ValueError(f"{len(given.runs)} runs and {len(weights)} weights: give one each")
    dtype = given.dtype or ("float32" if given.device == "cpu" else "bfloat16")
    first = read_run(given.runs[0])
    wish = _wish(given, first)
    pipe, runs = load_runs(given.runs, given.device, DTYPES[dtype])
    total = len(wish.prompts) * len(wish.seeds) * len(wish.strengths)
    grids: dict[int, dict[float, list[Image.Image]]] = {}
    bar = tqdm(total=total, desc="draw", unit="picture")
    for drawn in draw_wish(pipe, runs, wish, weights, given.per_prompt):
        write_picture(drawn, wish, dtype, given.output_dir)
        grids.setdefault(drawn.number, {}).setdefault(drawn.strength, []).append(drawn.image)
        bar.update()
    bar.close()
    for number, rows in grids.items():
        titles = [("base" if not strength else f"strength {strength:g}", images) for strength, images in rows.items()]
        heads = [f"seed {seed}" for seed in wish.seeds]
        save_picture(picture_grid(titles, heads), given.output_dir / f"grid-{number:02d}.png")
    write_text(given.output_dir / "prompts.txt", "".join(f"{prompt}\n" for prompt in wish.prompts))
    print(f"{total} pictures and {len(grids)} grids in {given.output_dir.resolve()}")


def _wish(given: argparse.Namespace, run: Run) -> Wish:
    """What the command line asks for; what it leaves open is as the run's own samples."""
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
    return Wish(
        prompts,
        list(dict.fromkeys(given.seeds)),
        list(dict.fromkeys(given.strengths)),
        given.num_inference_steps or int(str(run.config["num_inference_steps"])),
        float(str(run.config["guidance_scale"])) if given.guidance_scale is None else given.guidance_scale,
        given.height or side,
        given.width or side,
        given.batch_size,
        given.control_image,
    )


if __name__ == "__main__":
    main()
