"""One page of many runs, offline and in one file: scores with intervals, by subject and prompt, pictures, curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ether_diffusion.evaluation.controls.findings import OUTLINE
from ether_diffusion.evaluation.controls.pages import ControlSection, read_section
from ether_diffusion.evaluation.curves import loss_curves
from ether_diffusion.evaluation.subjects.costs import Steps, StepsError, read_steps, steps_of
from ether_diffusion.evaluation.subjects.found import Benchmark, read_benchmark
from ether_diffusion.evaluation.subjects.sections import THUMBNAIL, beside_scores, section
from ether_diffusion.evaluation.tables import format_difference
from ether_diffusion.files import write_text
from ether_diffusion.page.pictures import Picture, thumbnail
from ether_diffusion.page.render import render
from ether_diffusion.page.text import distinct_names, number
from ether_diffusion.runs.record import Run, read_run
from ether_diffusion.runs.report import evenly_spaced, run_record, short_path, short_paths

MAX_STEPS = 8


@dataclass(frozen=True)
class Collection:
    """Benchmarks, studies of controls and training runs, each in the order of their folders."""

    benchmarks: list[Benchmark]
    studies: list[ControlSection]
    runs: list[Run]


def read_folders(folders: Sequence[Path]) -> Collection:
    """What lies in the folders.

    Raises:
        FileNotFoundError: in one of them there is none of it.
    """
    found = Collection([], [], [])
    for folder, name in zip(folders, distinct_names(folders), strict=True):
        if (folder / "provenance.json").is_file():
            found.runs.append(read_run(folder))
        elif (folder / OUTLINE).is_file():
            found.studies.append(read_section(folder, name))
        else:
            found.benchmarks.append(read_benchmark(folder, name))
    return found


def write_report(folders: Sequence[Path], output: Path, steps: Path | None = None) -> Path:
    """Write the page of the folders of benchmarks, studies of controls and training runs; return its path.

    Args:
        folders: what it shows.
        output: the page.
        steps: times and memory of the benchmarks' methods, as ``benchmarks/step.py --arms CONFIG --json FILE`` wrote
            them.

    Raises:
        FileNotFoundError: a folder is none of these.
        StepsError: the steps are of other bases or methods than the benchmarks.
    """
    found = read_folders(folders)
    known_steps = _steps_of_benchmarks(found.benchmarks, steps)
    page = render(
        Path(__file__).with_name("overview.html.jinja"),
        {
            "score": number,
            "rounded": number,
            "short": short_path,
            "short_paths": short_paths,
            "rate": partial(number, spec="g"),
            "difference": format_difference,
        },
        sections=[
            {"id": f"b{place}", **section(benchmark), **beside_scores(benchmark, known)}
            for place, (benchmark, known) in enumerate(zip(found.benchmarks, known_steps, strict=True))
        ],
        studies=found.studies,
        short=short_path,
        runs=[
            {"name": name, "run": run, "grid": step_grid(run), "settings": run_record(run)}
            for name, run in zip(distinct_names([run.folder for run in found.runs]), found.runs, strict=True)
        ],
        run_curves=loss_curves(found.runs),
        names=distinct_names(folders),
    )
    write_text(output, page)
    return output


def _steps_of_benchmarks(benchmarks: Sequence[Benchmark], path: Path | None) -> list[Steps | None]:
    """Of every benchmark its table in the file of steps.

    Raises:
        StepsError: the file has a table of none of them.
    """
    if path is None:
        return [None] * len(benchmarks)
    tables = read_steps(path)
    found = [steps_of(benchmark.base, tables) for benchmark in benchmarks]
    if not any(found):
        models = ", ".join(table["model"] for table in tables)
        bases = ", ".join(benchmark.base for benchmark in benchmarks) or "none"
        raise StepsError(f"{path} measures {models}, the bases of the benchmarks are {bases}")
    return found


def step_grid(run: Run) -> tuple[list[int], list[tuple[str, list[Picture]]]]:
    """The steps that are shown, and every prompt's pictures at these."""
    steps = evenly_spaced(run.sample_steps, MAX_STEPS)
    rows = []
    for prompt in run.prompts:
        title = f"{prompt['prompt']}, seed {prompt['seed']}"
        pictures = [
            Picture(thumbnail(run.folder / run.sample(step, prompt["file"]), THUMBNAIL), f"Step {step}: {title}", title)
            for step in steps
        ]
        rows.append((title, pictures))
    return steps, rows
