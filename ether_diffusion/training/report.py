"""The report of a run: one HTML file that opens offline, made from the run folder alone.

``python -m ether_diffusion.training.report runs/dog`` writes ``runs/dog/report.html`` anew.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypedDict

import matplotlib
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from ether_diffusion.files import write_text

MAX_STEPS = 12  # sample steps in the grid
MAX_FIRST_SCREEN = 6  # pictures in each column of the first screen
THUMBNAIL = 256  # pixels, the longer side
FULL_SIZE_THUMBNAILS = 80  # pictures in the grid; more than these get smaller ones, to keep the file below 5 MB
CURVE_POINTS = 600  # raw points drawn per curve

METHOD_NAMES = {
    "ether_plus": "ETHER+",
    "ether": "ETHER",
    "naive": "Naive",
    "full": "Full finetuning",
    "lora": "LoRA",
    "oft": "OFT",
    "boft": "BOFT",
    "hra": "HRA",
}
HIGHLIGHTS = (
    "method",
    "n_blocks",
    "targets",
    "learning_rate",
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "resolution",
    "mixed_precision",
    "seed",
    "with_prior_preservation",
    "train_text_encoder",
)


class Provenance(TypedDict):
    """``provenance.json``: what a result depends on beside its settings."""

    config_hash: str
    base_model: str
    base_hash: dict[str, str]
    git_revision: str | None
    versions: dict[str, str]
    device: str
    num_processes: int
    trained_parameters: dict[str, int]
    status: str
    step: int
    instance_images: list[str]
    class_images: int
    skipped_images: list[dict[str, str]]
    started: str
    seconds: float


_UNRECORDED: Provenance = {
    "config_hash": "",
    "base_model": "",
    "base_hash": {},
    "git_revision": None,
    "versions": {},
    "device": "",
    "num_processes": 1,
    "trained_parameters": {},
    "status": "running",
    "step": 0,
    "instance_images": [],
    "class_images": 0,
    "skipped_images": [],
    "started": "",
    "seconds": 0.0,
}


class MetricsRow(TypedDict, total=False):
    """One line of ``metrics.jsonl``: one optimisation step."""

    step: int
    loss: float
    instance_loss: float
    prior_loss: float
    lr: dict[str, float]
    grad_norm: float
    steps_per_second: float


class SamplePrompt(TypedDict):
    """One entry of ``samples/prompts.json``: the picture ``file`` in every ``samples/step-*`` folder."""

    file: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Run:
    """What a run folder says. ``sample_steps`` ascends; step 0 is the base model without the adapter."""

    folder: Path
    config: dict[str, object]
    provenance: Provenance
    metrics: list[MetricsRow]
    torn_lines: int
    prompts: list[SamplePrompt]
    sample_steps: list[int]
    scores: dict[str, dict[str, float | None]]

    @property
    def method(self) -> str:
        """The method as people write it: ``ETHER+``."""
        method = str(self.config.get("method", "ether_plus"))
        return METHOD_NAMES.get(method, method)

    @property
    def base(self) -> str:
        """The base model's Hub id or folder."""
        return str(self.config.get("pretrained_model_name_or_path") or self.provenance["base_model"])

    @property
    def instance_prompt(self) -> str:
        """The prompt that names the subject, or an empty string."""
        return str(self.config.get("instance_prompt") or "")

    @property
    def trained(self) -> str:
        """The trained parameters in words, with their size in fp32: ``398,592 parameters (1.6 MB)``."""
        count = sum(self.provenance["trained_parameters"].values())
        return f"{count:,} parameters ({_megabytes(4 * count)})"

    @property
    def steps(self) -> str:
        """How far the run got: ``600 of 1,400 steps``."""
        step, planned = self.provenance["step"], self.config.get("max_train_steps")
        return f"{step:,} of {planned:,} steps" if isinstance(planned, int) else f"{step:,} steps"

    @property
    def finetuned_step(self) -> int | None:
        """The last step with samples of the finetuned model; ``None`` before the first."""
        return max((step for step in self.sample_steps if step > 0), default=None)

    def sample(self, step: int, file: str) -> Path:
        """The path of one sample, relative to the run folder."""
        return Path("samples") / f"step-{step:06d}" / file


def read_run(run_dir: str | Path) -> Run:
    """Read a run folder, finished or not. Only ``config.yaml`` and ``provenance.json`` must be there.

    Raises:
        FileNotFoundError: ``run_dir`` is not a run folder.
    """
    folder = Path(run_dir).resolve()
    for required in ("config.yaml", "provenance.json"):
        if not (folder / required).is_file():
            raise FileNotFoundError(
                f"{run_dir} is not a run folder: it has no {required}. "
                "Give the folder that a training program wrote (its output_dir), such as runs/dog."
            )
    metrics, torn_lines = _read_metrics(folder / "metrics.jsonl")
    prompts = folder / "samples" / "prompts.json"
    scores = folder / "scores.json"
    return Run(
        folder=folder,
        config=yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {},
        provenance=_UNRECORDED | json.loads((folder / "provenance.json").read_text(encoding="utf-8")),
        metrics=metrics,
        torn_lines=torn_lines,
        prompts=json.loads(prompts.read_text(encoding="utf-8")) if prompts.is_file() else [],
        sample_steps=_sample_steps(folder / "samples"),
        scores=json.loads(scores.read_text(encoding="utf-8")) if scores.is_file() else {},
    )


def _read_metrics(path: Path) -> tuple[list[MetricsRow], int]:
    """The rows by ascending step and the number of torn lines (a killed run leaves one).

    A resumed run repeats the steps after its checkpoint: the later row of a step counts.
    """
    rows: dict[int, MetricsRow] = {}
    torn = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row: MetricsRow = json.loads(line)
        except json.JSONDecodeError:
            torn += 1
        else:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)], torn


def _sample_steps(samples: Path) -> list[int]:
    names = (path.name for path in samples.glob("step-*") if path.is_dir())
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name)))


# ---------------------------------------------------------------------------------------------- the page


@dataclass(frozen=True)
class Picture:
    """A thumbnail: ``source`` is a data URI, or ``None`` where the file is missing or cannot be read."""

    source: str | None
    alt: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """One column of the first screen; ``note`` says what it does not show."""

    title: str
    pictures: list[Picture]
    note: str


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into the run folder, atomically, and return its path.

    The page holds all it shows (thumbnails as base64, curves as SVG) and asks nothing of the network. It can
    be written at any time of a run.

    Raises:
        FileNotFoundError: ``run_dir`` is not a run folder.
    """
    run = read_run(run_dir)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(value=format_value, duration=_duration, date=_date)
    shown = evenly_spaced(run.sample_steps, MAX_STEPS)
    page = environment.get_template("report.html.jinja").render(
        run=run,
        provenance=run.provenance,
        galleries=[
            _references(run),
            _samples(run, "Base model", 0),
            _samples(run, "Finetuned", run.finetuned_step),
        ],
        steps=shown,
        left_out=[step for step in run.sample_steps if step not in shown],
        grid=_grid(run, shown),
        curves=_curves(run.metrics),
        diverged=[row["step"] for row in run.metrics if not math.isfinite(row.get("loss", 0.0))],
        score_columns=list(dict.fromkeys(column for row in run.scores.values() for column in row)),
        highlights=[key for key in HIGHLIGHTS if key in run.config],
    )
    path = run.folder / "report.html"
    write_text(path, page)
    return path


def evenly_spaced(items: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of ``items``, at even distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def thumbnail(path: Path, size: int) -> str | None:
    """The picture within ``size`` by ``size`` pixels as a WebP data URI; ``None`` if it cannot be read."""
    try:
        with Image.open(path) as image:
            small = ImageOps.exif_transpose(image).convert("RGB")
    except OSError:
        return None
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _references(run: Run) -> Gallery:
    """The subject's own pictures, as far as they are still where the run found them."""
    paths = [Path(path) for path in run.provenance["instance_images"]]
    pictures = [Picture(thumbnail(path, THUMBNAIL), f"Reference {path.name}", path.name) for path in paths]
    readable = [picture for picture in pictures if picture.source]
    notes = []
    if not pictures:
        notes.append("The run recorded no reference pictures.")
    if len(readable) > MAX_FIRST_SCREEN:
        notes.append(f"The first {MAX_FIRST_SCREEN} of {len(readable)}.")
    if gone := [picture.caption for picture in pictures if not picture.source]:
        notes.append(f"No longer readable where the run found them: {', '.join(gone)}.")
    return Gallery("References", readable[:MAX_FIRST_SCREEN], " ".join(notes))


def _samples(run: Run, title: str, step: int | None) -> Gallery:
    if step is None or step not in run.sample_steps or not run.prompts:
        return Gallery(title, [], "No samples yet." if step is None else "This run has no samples of it.")
    shown = run.prompts[:MAX_FIRST_SCREEN]
    note = f"The first {len(shown)} of {len(run.prompts)} prompts." if len(run.prompts) > len(shown) else ""
    heading = title if step == 0 else f"{title}, step {step:,}"
    return Gallery(heading, [_sample(run, prompt, step, THUMBNAIL) for prompt in shown], note)


def _sample(run: Run, prompt: SamplePrompt, step: int, size: int) -> Picture:
    source = thumbnail(run.folder / run.sample(step, prompt["file"]), size)
    model = f"Step {step}" if step else "Base model"
    return Picture(source, f"{model}: {prompt['prompt']}", prompt["prompt"])


def _grid(run: Run, steps: list[int]) -> list[tuple[SamplePrompt, list[Picture]]]:
    """Every prompt with its pictures at ``steps``; the more pictures, the smaller each."""
    count = max(1, len(run.prompts) * len(steps))
    size = min(THUMBNAIL, round(THUMBNAIL * math.sqrt(FULL_SIZE_THUMBNAILS / count)))
    return [(prompt, [_sample(run, prompt, step, size) for step in steps]) for prompt in run.prompts]


# -------------------------------------------------------------------------------------------- the curves

_INK = {
    "#010101": "currentColor",
    "#020202": "var(--line)",
    "#030303": "var(--accent)",
    "#040404": "var(--second)",
}
_TEXT, _RULE, *_COLOURS = _INK  # matplotlib draws with these stand-ins; the page's theme colours replace them


@dataclass(frozen=True)
class Curve:
    """An inline SVG with the sentence that explains it."""

    title: str
    svg: Markup
    caption: str


def _curves(metrics: list[MetricsRow]) -> list[Curve]:
    """Loss, learning rate and gradient norm over the steps, as far as the metrics hold them."""
    losses = {"loss": _series(metrics, "loss"), "prior loss": _series(metrics, "prior_loss")}
    norms = {"gradient norm": _series(metrics, "grad_norm")}
    components = dict.fromkeys(name for row in metrics for name in row.get("lr", {}))
    rates = {
        name: [(row["step"], row["lr"][name]) for row in metrics if name in row.get("lr", {})] for name in components
    }
    window = max(1, len(metrics) // 40)
    smoothed = "Every step, not smoothed."
    if window > 1:
        smoothed = f"Dots: single steps. Line: their exponential moving average over {window} steps."
    return [
        *_curve("Loss", losses, smoothed, window),
        *_curve("Learning rate", rates, "As the scheduler set it.", 1),
        *_curve("Gradient norm", norms, smoothed, window),
    ]


def _series(metrics: list[MetricsRow], key: str) -> list[tuple[int, float]]:
    """The finite values of ``key`` as (step, value)."""
    values = ((row["step"], row.get(key)) for row in metrics)
    return [(step, value) for step, value in values if isinstance(value, int | float) and math.isfinite(value)]


def _curve(title: str, series: dict[str, list[tuple[int, float]]], caption: str, window: int) -> list[Curve]:
    """One diagram in a list, or an empty list if no series has a point."""
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        for i, (name, points) in enumerate(drawn.items()):
            _plot(axes, name, points, _COLOURS[i % len(_COLOURS)], window)
        _dress(axes, legend=len(drawn) > 1)
        return [Curve(title, _inline_svg(figure, title), caption)]


def _plot(axes: Axes, name: str, points: list[tuple[int, float]], colour: str, window: int) -> None:
    steps, values = zip(*points, strict=True)
    stride = math.ceil(len(points) / CURVE_POINTS)
    if window > 1 or len(points) == 1:
        axes.plot(steps[::stride], values[::stride], ".", color=colour, alpha=0.3, markersize=5, markeredgewidth=0)
    axes.plot(steps, _moving_average(values, window), color=colour, linewidth=1.8, label=name)


def _moving_average(values: Iterable[float], window: int) -> list[float]:
    """The exponential moving average with decay 1 - 1/window, free of the bias towards its start."""
    total = weight = 0.0
    averages = []
    for value in values:
        total += (value - total) / window
        weight += (1 - weight) / window
        averages.append(total / weight)
    return averages


def _dress(axes: Axes, legend: bool) -> None:
    axes.set_xlabel("step", color=_TEXT)
    axes.tick_params(colors=_TEXT, length=0)
    axes.grid(color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.margins(x=0.02)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=False)
    axes.yaxis.get_offset_text().set_color(_TEXT)
    if legend:
        axes.legend(frameon=False, labelcolor=_TEXT)


def _inline_svg(figure: Figure, title: str) -> Markup:
    """The figure as an SVG element in the page's colours and font; its ids differ from its neighbours'."""
    buffer = io.StringIO()
    without_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=without_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    prefix = title.lower().replace(" ", "-")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for ink, themed in _INK.items():
        svg = svg.replace(ink, themed)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title} over the training steps"', 1))


# --------------------------------------------------------------------------------------------- the words


def format_value(value: object) -> str:
    """A setting or a score as people write it: yes, no, 0.006, ``-`` for nothing."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}" if math.isfinite(value) else "–"
        case list() | tuple():
            return ", ".join(format_value(item) for item in value) or "–"
        case _:
            return str(value)


def _megabytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _date(iso: str) -> str:
    return f"{datetime.fromisoformat(iso):%d %B %Y, %H:%M %Z}".strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of the run folder named on the command line and print its path."""
    parser = argparse.ArgumentParser(description="Write report.html of a run folder anew.")
    parser.add_argument("run", help="the run folder, such as runs/dog")
    try:
        print(write_report(parser.parse_args(arguments).run))
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
