"""One page of many runs, offline and in one file: scores with intervals, by subject and prompt, pictures, curves.

``python -m eval.report runs/playground runs/dog --output report.html``. A benchmark also fits on one picture:
``python -m eval.sheet runs/playground sheet.png --prompt 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from ether_diffusion.arguments import Parser
from ether_diffusion.evaluation.controls.findings import OUTLINE
from ether_diffusion.evaluation.controls.pages import ControlSection, read_section
from ether_diffusion.evaluation.subjects.arms import ANCHORS
from ether_diffusion.evaluation.subjects.benchmark import Benchmark, read_benchmark
from ether_diffusion.evaluation.subjects.costs import Steps, StepsError, costs, read_steps, steps_caption, steps_of
from ether_diffusion.evaluation.subjects.strengths import front_figure, strength_pictures
from ether_diffusion.evaluation.subjects.summary import (
    BY_KEY,
    AtStrength,
    Metric,
    Result,
    arm_title,
    comparisons,
    strength_points,
    strength_rows,
)
from ether_diffusion.evaluation.subjects.tuning import tuned_against_default, tunings
from ether_diffusion.evaluation.tables import caption, format_difference, shown_metrics
from ether_diffusion.files import write_text
from ether_diffusion.images import load_image
from ether_diffusion.page.palette import styles
from ether_diffusion.page.pictures import SIDE, Picture, picture_grid, save_picture, thumbnail
from ether_diffusion.page.render import render
from ether_diffusion.page.svg import COLOURS, TEXT, Curve, dress, figure_style, inline_svg
from ether_diffusion.page.text import distinct_names, number
from ether_diffusion.ranges import AMOUNT, Range
from ether_diffusion.reading import DamagedFileError
from ether_diffusion.registry import title_of
from ether_diffusion.runs.curves import moving_average
from ether_diffusion.runs.record import Run, read_run
from ether_diffusion.runs.report import evenly_spaced, run_record, short_path, short_paths, shown_setting
from ether_diffusion.runs.watch import watch
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

MAX_PICTURES = 1500
"""In the page; of a greater benchmark fewer prompts of each subject are shown, and the page says so."""
THUMBNAIL = 128
FIGURE = (4.6, 2.9)
"""Inches: what fills a phone's width with letters that can be read."""
MAX_LEGEND = 6
MAX_STEPS = 8
MAX_REFERENCES = 6
BLANK = Image.new("RGB", (SIDE, SIDE), "white")
"""In the place of a picture that is not there."""


@dataclass(frozen=True)
class PromptRow:
    """One prompt of a subject: of every arm a picture, and its scores in the order of :func:`by_subject`."""

    prompt: str
    cells: list[tuple[Picture | None, list[float | None]]]


@dataclass(frozen=True)
class SubjectSection:
    """A subject: its references, its means for every arm, and its prompts; ``left_out`` prompts are not shown."""

    name: str
    references: list[Picture]
    means: list[list[float | None]]
    prompts: list[PromptRow]
    left_out: int


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
            {"id": f"b{place}", **_section(benchmark), **_beside_scores(benchmark, known)}
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


def _beside_scores(benchmark: Benchmark, steps: Steps | None) -> dict[str, Any]:
    """Costs, strengths and settings of a benchmark, and the words by which its methods are found."""
    best = {(row["arm"], row["learning_rate"]) for row in benchmark.shown_arms}
    at_best = [result for result in benchmark.results if (result["arm"], result["learning_rate"]) in best]
    points, shown = strength_points(at_best), strength_rows(at_best)
    known = tunings(benchmark.results, benchmark.rows)

    def results_at(point: AtStrength, subject: str) -> list[Result]:
        return benchmark.results_of(point.row, subject)

    subjects = benchmark.subjects[: max(1, MAX_PICTURES // max(1, len(shown)))]
    return {
        "methods": method_words(benchmark),
        "costs": costs(benchmark.rows, steps),
        "steps": None if steps is None else steps_caption(steps),
        "points": points,
        "front": front_figure(points, benchmark.primary, benchmark.name) if points else None,
        "at_strengths": shown,
        "strength_pictures": strength_pictures(shown, subjects, results_at, benchmark.picture, THUMBNAIL),
        "tunings": known,
        "tuned": tuned_against_default(benchmark.results, known, benchmark.primary),
    }


def method_words(benchmark: Benchmark) -> dict[str, str]:
    """By arm the words by which the page's filter finds it: its name, and its method's title or what the anchor is."""
    found = {}
    for row in benchmark.rows:
        arm = row["arm"]
        settings = next((r["settings"] for r in benchmark.results if r["arm"] == arm and r.get("settings")), None)
        title = ANCHORS.get(arm, "") if settings is None else title_of({"method": DreamBoothConfig.method, **settings})
        found[arm] = f"{arm} {title}".strip()
    return found


def _section(benchmark: Benchmark) -> dict[str, Any]:
    """What the template shows of a benchmark."""
    compared = comparisons(benchmark.results)
    return {
        "benchmark": benchmark,
        "metrics": shown_metrics(benchmark.rows),
        "by_subject": by_subject(benchmark),
        "compared": compared,
        "caption": caption(benchmark.rows, compared),
        "arms": [(row["arm"], arm_title(row)) for row in benchmark.shown_arms],
        "subjects": subject_sections(benchmark),
        "curves": rate_curves(benchmark),
        "settings": {key: shown_setting(key, value) for key, value in benchmark.settings.items()},
        "record": record(benchmark),
    }


def record(benchmark: Benchmark) -> dict[str, str]:
    """What the results depend on beside the settings, as far as they say it: hashes, and settings of each arm."""
    found: dict[str, list[str]] = {}
    for result in benchmark.results:
        for key, title in (("settings_hash", "Hash of the settings"), ("base_hash", "Hash of the base")):
            if value := result.get(key):
                found.setdefault(f"{title}, {result['arm']}" if key == "settings_hash" else title, []).append(value)
        if settings := result.get("settings"):
            said = ", ".join(f"{name} {shown_setting(name, value)}" for name, value in settings.items())
            found.setdefault(f"Settings, {result['arm']}", []).append(said)
    return {title: "; ".join(sorted(set(values))) for title, values in sorted(found.items())}


def by_subject(benchmark: Benchmark) -> tuple[Metric, Metric]:
    """The scores that are shown for every subject and prompt: the one that decides, and CLIP-T."""
    return benchmark.primary, BY_KEY["clip_t"]


def subject_sections(benchmark: Benchmark) -> list[SubjectSection]:
    """Every subject with the arms at their best learning rate beside each other."""
    arms, sections = benchmark.shown_arms, []
    prompts = max((len(_prompts(r)) for r in benchmark.results), default=0)
    wanted = max(1, MAX_PICTURES // max(1, len(arms) * len(benchmark.subjects)))
    for subject in benchmark.subjects:
        of_arms = [benchmark.results_of(row, subject) for row in arms]
        asked = list(dict.fromkeys(prompt for results in of_arms for r in results for prompt in _prompts(r)))
        shown = [asked[index] for index in evenly_spaced(range(len(asked)), min(wanted, prompts))]
        sections.append(
            SubjectSection(
                subject,
                _references(benchmark, subject),
                [[_mean(results, metric) for metric in by_subject(benchmark)] for results in of_arms],
                [PromptRow(p, [_cell(benchmark, results, p) for results in of_arms]) for p in shown],
                len(asked) - len(shown),
            )
        )
    return sections


def _prompts(result: Result) -> list[str]:
    return list(dict.fromkeys(row["prompt"] for row in result["images"] if "prompt" in row))


def _references(benchmark: Benchmark, subject: str) -> list[Picture]:
    """The subject's own pictures, as far as they are still where they were scored."""
    result = next(result for result in benchmark.results if result["subject"] == subject)
    paths = [Path(path) for path in result.get("references", ())][:MAX_REFERENCES]
    return [Picture(thumbnail(path, THUMBNAIL), f"Reference {path.name}", path.name) for path in paths]


def _mean(results: list[Result], metric: Metric, prompt: str | None = None) -> float | None:
    rows = [row for result in results for row in result["images"] if prompt is None or row.get("prompt") == prompt]
    values = [row[metric.key] for row in rows if metric.key in row]
    return fmean(values) if values else None


def _cell(benchmark: Benchmark, results: list[Result], prompt: str) -> tuple[Picture | None, list[float | None]]:
    """The first picture for the prompt, and the means of all of them."""
    scores = [_mean(results, metric, prompt) for metric in by_subject(benchmark)]
    for result in results:
        if (path := _file(benchmark, result, prompt)) is not None:
            asked = f"{prompt}, seed {result['seed']}"
            return Picture(thumbnail(path, THUMBNAIL), f"{result['arm']}: {asked}", asked), scores
    return None, scores


def rate_curves(benchmark: Benchmark) -> list[Curve]:
    """DINO and CLIP-T against the learning rate, where an arm has several."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in benchmark.rows:
        if row["learning_rate"] is not None and not row["diverged"]:
            arms.setdefault(row["arm"], []).append(row)
    several = {arm: sorted(rows, key=lambda row: row["learning_rate"]) for arm, rows in arms.items() if len(rows) > 1}
    if not several:
        return []
    return [_rate_curve(several, metric, benchmark.name) for metric in by_subject(benchmark)]


def _rate_curve(arms: dict[str, list[dict[str, Any]]], metric: Metric, where: str) -> Curve:
    title = f"{metric.title} against the learning rate"
    with figure_style(f"{where} {title}"):
        figure = Figure(figsize=FIGURE, layout="constrained")
        axes = figure.subplots()
        known = styles(list(arms))
        for arm, rows in arms.items():
            style = known[arm]
            colour = COLOURS[style.number]
            rates = [row["learning_rate"] for row in rows]
            score = [row["scores"][metric.key] for row in rows]
            axes.plot(
                *(rates, [s["mean"] for s in score], style.dashes),
                color=colour,
                marker=style.marker,
                markersize=4,
                label=arm,
            )
            if all(s["low"] is not None for s in score):
                low, high = ([s[part] for s in score] for part in ("low", "high"))
                axes.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        dress(axes, "learning rate", legend=True)
        svg = inline_svg(figure, f"{where} {title}", title)
    return Curve(title, svg, "Mean over subjects; the shade is its 95 % interval, where there are several.")


def loss_curves(runs: Sequence[Run]) -> list[Curve]:
    """The smoothed losses of all runs in one figure."""
    known = [run for run in runs if run.metrics]
    if not known:
        return []
    title = "Loss of the runs"
    with figure_style(title):
        width, height = FIGURE
        many = len(known) > MAX_LEGEND
        figure = Figure(figsize=(width, height + 0.1 * len(known) * many), layout="constrained")
        axes = figure.subplots()
        names = distinct_names([run.folder for run in known])
        drawn = styles(names, [run.method for run in known])
        for name, run in zip(names, known, strict=True):
            values = moving_average([row["loss"] for row in run.metrics], max(1, len(run.metrics) // 20))
            style, steps = drawn[name], [row["step"] for row in run.metrics]
            axes.plot(steps, values, style.dashes, color=COLOURS[style.number], label=name)
        dress(axes, "step", legend=not many)
        if many:  # beside the lines there is no room
            figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=TEXT)
        return [
            Curve(title, inline_svg(figure, title, title), "Exponential moving averages over a twentieth of the steps.")
        ]


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


def draw_sheet(folder: Path, subjects: Sequence[str] = (), prompt: int = 0) -> Image.Image:
    """One picture of a benchmark: a row per subject, its reference, then every method at its best rate for one prompt.

    The place of a picture that is not there, as in an unfinished benchmark, stays empty.

    Args:
        folder: where ``eval/dreambench.py`` wrote.
        subjects: rows; all where none is named.
        prompt: the number of the subject's prompt that is shown, of its first image.

    Raises:
        FileNotFoundError: it is no benchmark's folder, or pictures are gone.
        ValueError: a subject is not in it, or has no such prompt or no pictures yet.
    """
    benchmark = read_benchmark(folder, folder.name)
    arms, rows = benchmark.shown_arms, []
    for subject in subjects or benchmark.subjects:
        if subject not in benchmark.subjects:
            raise ValueError(f"{folder} has no subject {subject!r}; it has {', '.join(benchmark.subjects)}")
        found = [_drawn(benchmark.results_of(row, subject)) for row in arms]
        known = next((result for result in found if result is not None), None)
        if known is None:
            raise ValueError(f"{folder} has no pictures of {subject} yet")
        prompts = _prompts(known)
        if not 0 <= prompt < len(prompts):
            raise ValueError(f"{subject} has the prompts 0 to {len(prompts) - 1}, not {prompt}")
        files = [None if result is None else _file(benchmark, result, prompts[prompt]) for result in found]
        shown = [Path(known["references"][0]), *files]
        rows.append((prompts[prompt], [BLANK if path is None else load_image(path) for path in shown]))
    return picture_grid(rows, ["reference", *(str(row["arm"]) for row in arms)])


def _drawn(results: list[Result]) -> Result | None:
    """The first result with pictures; a training that diverged has none."""
    return next((result for result in results if result["images"]), None)


def _file(benchmark: Benchmark, result: Result, prompt: str) -> Path | None:
    """The first picture for a prompt."""
    files = (row["file"] for row in result["images"] if row.get("prompt") == prompt)
    return next((benchmark.picture(result, file) for file in files), None)


def sheet_main(arguments: Sequence[str] | None = None) -> None:
    """Write the sheet of the benchmark named on the command line."""
    parser = Parser(description="One picture of a benchmark.")
    parser.add_argument("folder", type=Path, help="the benchmark's folder, such as runs/playground")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    parser.add_argument("--subjects", nargs="*", default=[], help="default: all")
    parser.add_argument("--prompt", type=AMOUNT.of(int), default=0, help="number of the prompt that is shown")
    given = parser.parse_args(arguments)
    try:
        save_picture(draw_sheet(given.folder, given.subjects, given.prompt), given.picture)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(given.picture)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: write the page and print its path.

    Raises:
        SystemExit: a folder is neither a benchmark's nor a run's, or damaged, or --watch cannot serve it.
    """
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN", help="folders of benchmarks, studies of controls, training runs"
    )
    parser.add_argument("--output", type=Path, help="default: report.html in the first folder that is no training run")
    parser.add_argument(
        "--steps",
        type=Path,
        metavar="FILE",
        help="times and memory of a benchmark's methods: what benchmarks/step.py --arms CONFIG --json FILE wrote",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve the page of one training run on this machine, and renew it when the run's files change",
    )
    parser.add_argument(
        "--port", type=Range(0, 65535).of(int), help="of --watch (default: 8765, or a free one where it is taken)"
    )
    given = parser.parse_args(arguments)
    if given.watch:
        if len(given.folders) > 1 or given.output is not None or given.steps is not None:
            parser.error("--watch serves the page of one training run: give one folder, and no --output or --steps")
        try:
            watch(given.folders[0], given.port)
        except (DamagedFileError, OSError) as error:
            parser.error(str(error))
        return
    if given.port is not None:
        parser.error("--port is for --watch: add it, or leave --port out")
    studies = [folder for folder in given.folders if not (folder / "provenance.json").is_file()]
    output = given.output or (studies[0] if studies else Path.cwd()) / "report.html"
    try:
        print(write_report(given.folders, output, given.steps).resolve())
    except (DamagedFileError, FileNotFoundError, StepsError) as error:
        parser.error(str(error))
