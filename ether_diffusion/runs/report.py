"""The report of a run: one HTML file that opens offline, made from the run folder alone.

``python -m ether_diffusion.runs.report runs/dog`` writes ``runs/dog/report.html`` anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from ether_diffusion.arguments import Parser
from ether_diffusion.files import write_text
from ether_diffusion.page.pictures import Picture, shared_size, thumbnail
from ether_diffusion.page.render import render
from ether_diffusion.page.text import duration, number
from ether_diffusion.pipelines.file import FILE_NAME
from ether_diffusion.pipelines.learned_embeds import LEARNED_EMBEDS
from ether_diffusion.pipelines.schema import LORA_FILE
from ether_diffusion.runs.choosing import BEST, KEPT_CLIP_T
from ether_diffusion.runs.curves import draw_curves, draw_sample_scores
from ether_diffusion.runs.folder import PATHS
from ether_diffusion.runs.record import BEST_FILE, Run, RunRecordError, SamplePrompt, format_value, read_run

MAX_STEPS = 12  # sample steps in the grid
MAX_FIRST_SCREEN = 6  # pictures in each column of the first screen
THUMBNAIL = 256  # pixels, the longer side
ABSOLUTE = re.compile(r"""(?<![\w.…/:\\])(?:[A-Za-z]:[\\/]|~?/)[^\s'",;:()<>]+""")
"""A path from the root of a system's files, within a text; no address of the web."""
FULL_SIZE_THUMBNAILS = 80  # pictures in the grid; more than these get smaller ones, to keep the file below 5 MB


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
        RunRecordError: a file of it is damaged.
    """
    run = read_run(run_dir)
    path = run.folder / "report.html"
    write_text(path, report_page(run))
    return path


def report_page(run: Run, watched: str | None = None) -> str:
    """The report as HTML.

    Args:
        run: what the folder says.
        watched: the state of the folder that the page is of, where a server answers what it is now
            (:mod:`ether_diffusion.runs.watch`); the page loads itself again when the two differ.
    """
    shown = _shown_steps(run)
    return render(
        Path(__file__).with_name("report.html.jinja"),
        {
            "value": format_value,
            "score": partial(number, missing="–"),
            "duration": duration,
            "date": _date,
            "short": short_path,
        },
        short=short_path,
        watched=watched,
        run=run,
        provenance=run.provenance,
        galleries=[
            _conditions(run) if run.control else _references(run),
            _samples(run, "Base model", 0),
            _samples(run, "Finetuned", run.finetuned_step),
        ],
        steps=shown,
        columns=[*(["control"] if run.control and shown else []), *(_column(run, step) for step in shown)],
        left_out=[step for step in run.sample_steps if step not in shown],
        grid=_grid(run, shown),
        files=_files(run),
        curves=draw_curves(run.metrics, run.validation),
        choosing=draw_sample_scores(run.sample_scores),
        kept=KEPT_CLIP_T,
        score_columns=list(dict.fromkeys(column for row in run.scores.values() for column in row)),
        config={key: shown_setting(key, value) for key, value in run.config.items()},
    )


def _shown_steps(run: Run) -> list[int]:
    """The steps of the grid, evenly spaced, and the best one among them."""
    steps = evenly_spaced(run.sample_steps, MAX_STEPS)
    if run.best_step in run.sample_steps and run.best_step not in steps:
        nearest = min(steps[1:-1], key=lambda step: abs(step - int(run.best_step or 0)))
        steps[steps.index(nearest)] = int(run.best_step or 0)
    return steps


def _column(run: Run, step: int) -> str:
    if step == 0:
        return "base"
    return f"{step:,} (best)" if step == run.best_step else f"{step:,}"


def _files(run: Run) -> list[tuple[str, str, str]]:
    """What the run has made to load elsewhere: the file, what it is, and its size."""
    kinds = {
        FILE_NAME: f"the {run.method_name} adapter of the last step: ether.load",
        LORA_FILE: ("the same as an exact LoRA" if run.entry.is_own else "the LoRA") + ", for tools that read LoRA",
    }
    if run.placeholder_token is not None:
        kinds[LEARNED_EMBEDS] = f"the embeddings of the new token {run.placeholder_token}, which ether.load adds, too"
    if run.kept_step is not None:
        rank = "the best" if run.kept_step == run.best_step else "the best so far when the run was stopped"
        kinds[BEST_FILE] = f'the adapter of step {run.kept_step:,}, {rank}: ether.load(…, subfolder="{BEST}")'
    found = {name: run.folder / name for name in kinds if (run.folder / name).is_file()}
    return [(name, kinds[name], f"{path.stat().st_size / 1e6:.2f} MB") for name, path in found.items()]


def evenly_spaced(items: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of ``items``, at even distances, the first and, unless it is to be one, the last among them."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def short_path(path: str) -> str:
    """The last two parts of a path, so that a published page does not tell where things lie; Hub ids stay whole."""
    parts = Path(path).parts
    return path if len(parts) <= 2 else "…/" + "/".join(parts[-2:])


def short_paths(text: str) -> str:
    """A text such as an error, of every absolute path in it the last two parts."""
    return ABSOLUTE.sub(lambda found: short_path(found[0]), text)


def shown_setting(key: str, value: object) -> str:
    """A setting as people write it; of a path on this machine its last two parts, also within settings of settings."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {shown_setting(str(name), each)}' for name, each in value.items())}}}"
    text = format_value(value)
    is_path = bool(value) and (key in PATHS or key.endswith("_dir") or Path(text).is_absolute())
    return short_path(text) if is_path else text


def run_record(run: Run) -> dict[str, str]:
    """The settings of a run, and what its result depends on beside them."""
    settings = {key: shown_setting(key, value) for key, value in run.config.items()}
    hashes = {f"Hash of the base {name}": digest for name, digest in run.provenance.base_hash.items()}
    versions = {f"Version of {name}": version for name, version in run.provenance.versions.items()}
    revision = {"Git revision": run.provenance.git_revision or "not recorded"}
    return settings | {"Hash of the settings": run.provenance.config_hash} | hashes | revision | versions


def _references(run: Run) -> Gallery:
    """The subject's own pictures, as far as they are still where the run found them."""
    paths = [Path(path) for path in run.provenance.instance_images]
    shown = paths[:MAX_FIRST_SCREEN]
    pictures = [Picture(thumbnail(path, THUMBNAIL), f"Reference {path.name}", path.name) for path in shown]
    notes = []
    if not paths:
        notes.append("The run recorded no reference pictures.")
    if len(paths) > len(shown):
        notes.append(f"The first {len(shown)} of {len(paths)}.")
    if gone := [picture.caption for picture in pictures if not picture.source]:
        notes.append(f"No longer readable where the run found them: {', '.join(gone)}.")
    return Gallery("References", [picture for picture in pictures if picture.source], " ".join(notes))


def _conditions(run: Run) -> Gallery:
    """What controls the samples beside it, in their order."""
    shown = [prompt for prompt in _first(run) if "condition" in prompt]
    pictures = [_condition(run, prompt, THUMBNAIL) for prompt in shown]
    return Gallery("Control", [item for item in pictures if item], "" if shown else "No samples yet.")


def _condition(run: Run, prompt: SamplePrompt, size: int) -> Picture | None:
    """The thumbnail of what controls a sample."""
    if "condition" not in prompt:
        return None
    source = thumbnail(run.folder / "samples" / prompt["condition"], size)
    return Picture(source, f"Control: {prompt['prompt']}", prompt["prompt"])


def _first(run: Run) -> list[SamplePrompt]:
    """The samples of the first screen: every prompt, then more seeds."""
    return sorted(run.prompts, key=lambda prompt: prompt["seed"])[:MAX_FIRST_SCREEN]


def _samples(run: Run, title: str, step: int | None) -> Gallery:
    if step is None or step not in run.sample_steps or not run.prompts:
        return Gallery(title, [], "No samples yet." if step is None else "This run has no samples of it.")
    shown = _first(run)
    left_out = len(run.prompts) > len(shown)
    note = f"{len(shown)} of {len(run.prompts)} samples; all of them stand below." if left_out else ""
    heading = title if step == 0 else f"{title}, step {step:,}"
    return Gallery(heading, [_sample(run, prompt, step, THUMBNAIL) for prompt in shown], note)


def _sample(run: Run, prompt: SamplePrompt, step: int, size: int) -> Picture:
    source = thumbnail(run.folder / run.sample(step, prompt["file"]), size)
    model = f"Step {step}" if step else "Base model"
    caption = ", ".join(part for part in (prompt["prompt"], f"seed {prompt['seed']}") if part)
    return Picture(source, f"{model}: {caption}", caption)


def _grid(run: Run, steps: list[int]) -> list[tuple[SamplePrompt, list[Picture]]]:
    """Every prompt and seed with its control, if any, and its pictures at ``steps``; the more, the smaller each."""
    size = shared_size(len(run.prompts) * len(steps), THUMBNAIL, FULL_SIZE_THUMBNAILS)
    rows = []
    for prompt in run.prompts:
        condition = _condition(run, prompt, size)
        rows.append(
            (prompt, [*([condition] if condition else []), *(_sample(run, prompt, step, size) for step in steps)])
        )
    return rows


def _date(iso: str) -> str:
    return f"{datetime.fromisoformat(iso):%d %B %Y, %H:%M %Z}".strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of the run folder named on the command line and print its path."""
    parser = Parser(description="Write report.html of a run folder anew.")
    parser.add_argument("run", help="the run folder, such as runs/dog")
    try:
        print(write_report(parser.parse_args(arguments).run))
    except (FileNotFoundError, RunRecordError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
