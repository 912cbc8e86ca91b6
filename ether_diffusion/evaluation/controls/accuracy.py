"""Draw under a control, score how far pictures keep to it, and show the best, median and worst on a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ether_diffusion.files import write_text
from ether_diffusion.metrics.backbones import load_clip
from ether_diffusion.metrics.control import ControlScores, score_control
from ether_diffusion.metrics.control_tasks import ControlTask, Measure
from ether_diffusion.metrics.control_tasks.flags import task_of
from ether_diffusion.metrics.distribution import load_feature_model
from ether_diffusion.metrics.generated import Generated, Sample, read_generated, read_pairs, read_pictures, read_samples
from ether_diffusion.page.pictures import Picture, data_uri, thumbnail
from ether_diffusion.page.render import render
from ether_diffusion.page.text import decimals, markdown_table, number
from ether_diffusion.reading import read_json
from ether_diffusion.runs.control_drawing import Drawing
from ether_diffusion.runs.drawing import draw_samples, load_run
from ether_diffusion.runs.record import read_run
from ether_diffusion.runs.report import short_path

EACH = 3
"""So many of the best, the median and the worst pairs are shown."""
MAX_SAMPLES = 4
THUMBNAIL = 256


def score_folders(
    control: Generated,
    generated: Path,
    task: ControlTask,
    output_dir: Path,
    title: str,
    clip: str | None = None,
    fid_features: str | None = None,
    unrelated: Sequence[Path] | None = None,
    kid_subset_size: int | None = None,
    device: torch.device | str = "cpu",
    show: bool = False,
    drawn: dict[str, Any] | None = None,
) -> ControlScores:
    """Score what :func:`read_generated` found; write ``results.json``, ``scores.jsonl`` and ``report.html``.

    Args:
        control: pairs and pictures.
        generated: the folder of the pictures.
        task: how a picture is held against its condition.
        output_dir: where the files go.
        title: of the report.
        clip: judge of CLIP-T: a Hub id, a folder, playground, or anytorch: and a model; None for none.
        fid_features: see :func:`~ether_diffusion.metrics.distribution.load_feature_model`; None for no FID and KID.
        unrelated: real images for FID and KID; see :func:`~ether_diffusion.metrics.control.score_control`.
        kid_subset_size: of KID.
        device: where to compute.
        show: whether to show progress.
        drawn: how the pictures were drawn, where that is known.

    Raises:
        ImportError: a package is missing.
        OSError: a model cannot be loaded.
        ValueError: a condition does not fit its picture.
    """
    scores = score_control(
        control.pairs,
        [[generated / sample.file_name for sample in of_pair] for of_pair in control.samples],
        task,
        None if clip is None else load_clip(clip, device),
        None if fid_features is None else load_feature_model(fid_features, device),
        [
            [pair.prompt if sample.prompt is None else sample.prompt for sample in of_pair]
            for pair, of_pair in zip(control.pairs, control.samples, strict=True)
        ],
        unrelated,
        kid_subset_size,
        show=show,
    )
    everything = [sample for of_pair in control.samples for sample in of_pair]
    rows = [_row(row, sample) for row, sample in zip(scores.rows, everything, strict=True)]
    if drawn is not None:
        scores.choices["drawn"] = drawn
    results = {**asdict(scores), "title": title, "refused": control.refused}
    del results["rows"]
    write_text(output_dir / "scores.jsonl", "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    write_text(output_dir / "results.json", json.dumps(results, indent=1, ensure_ascii=False))
    write_control_report(scores, control, generated, task, title, output_dir / "report.html")
    return scores


def _row(row: dict[str, Any], sample: Sample) -> dict[str, Any]:
    return row | {"file": sample.file_name, "seed": sample.seed}


def table(scores: ControlScores) -> str:
    """The scores as a Markdown table: mean over the sample numbers ± its deviation, and the originals' beside it."""
    rows = []
    for measure in scores.measures:
        found = scores.scores[measure.key]
        spread = "" if found["spread"] is None else f" ± {number(found['spread'], '.4f')}"
        real = scores.originals.get(measure.key)
        cells = [f"{decimals(found['mean'], 4)}{spread}", decimals(found["overall"], 4)]
        title = f"{measure.title} {'↑' if measure.higher_is_better else '↓'}"
        rows.append([title, *cells, "" if real is None else decimals(real, 4)])
    return markdown_table(["score", "generated", "all as one set", "originals"], rows)


@dataclass(frozen=True)
class ShownPair:
    """A pair in the page.

    Attributes:
        rank: best, median or worst.
        name: of the pair.
        prompt: of its pictures.
        score: the mean of its pictures' first measure.
        pictures: condition, original, samples.
        looks: what the judge sees in each of the samples; empty where that cannot be shown.
        values: every sample's own figure.
    """

    rank: str
    name: str
    prompt: str | None
    score: float
    pictures: list[Picture]
    looks: list[Picture]
    values: list[float | None]


def write_control_report(
    scores: ControlScores, control: Generated, generated: Path, task: ControlTask, title: str, output: Path
) -> Path:
    """Write the page atomically; return its path.

    Args:
        scores: of the pairs of ``control``.
        control: pairs and pictures.
        generated: the folder of the pictures.
        task: that they were scored by; it looks once more at what is shown.
        title: of the page.
        output: its path.
    """
    pairs = shown_pairs(scores, control, generated, task)
    page = render(
        Path(__file__).with_name("accuracy.html.jinja"),
        {"number": partial(decimals, digits=3), "choice": _choice, "short": short_path},
        title=title,
        scores=scores,
        first=scores.measures[0],
        pairs=pairs,
        columns=max((len(pair.values) for pair in pairs), default=0),
        refused=control.refused,
    )
    write_text(output, page)
    return output


def shown_pairs(scores: ControlScores, control: Generated, generated: Path, task: ControlTask) -> list[ShownPair]:
    """The best, the median and the worst pairs, by the mean of their pictures' first measure."""
    measure = scores.measures[0]
    of_pairs: dict[str, list[float | None]] = {}
    for row in scores.rows:
        of_pairs.setdefault(row["pair"], []).append(row[measure.key])
    shown = []
    for rank, place in ranked([_mean(of_pairs[pair.name]) for pair in control.pairs], measure):
        pair, samples = control.pairs[place], control.samples[place][:MAX_SAMPLES]
        paths = [generated / sample.file_name for sample in samples]
        condition, looks = task.looks(pair, paths)
        pictures = [
            Picture(None if condition is None else data_uri(condition, THUMBNAIL, True), "Condition", pair.name),
            Picture(thumbnail(Path(str(pair.original)), THUMBNAIL), "Original", pair.name),
        ]
        for sample, path in zip(samples, paths, strict=True):
            caption = sample.file_name if sample.seed is None else f"{sample.file_name}, seed {sample.seed}"
            pictures.append(Picture(thumbnail(path, THUMBNAIL), f"Generated {sample.file_name}", caption))
        seen = [
            Picture(data_uri(look, THUMBNAIL, True), f"What the judge sees in {sample.file_name}", sample.file_name)
            for look, sample in zip(looks, samples, strict=True)
            if look is not None
        ]
        values = of_pairs[pair.name]
        shown.append(
            ShownPair(
                rank, pair.name, samples[0].prompt or pair.prompt, _mean(values), pictures, seen, values[:MAX_SAMPLES]
            )
        )
    return shown


def ranked(values: Sequence[float], measure: Measure, each: int = EACH) -> list[tuple[str, int]]:
    """The numbers of the best, the median and the worst of the values, the best first; none twice, no NaN."""
    known = [number for number in range(len(values)) if not np.isnan(values[number])]
    order = sorted(known, key=lambda number: values[number], reverse=measure.higher_is_better)
    if len(order) <= 3 * each:
        third = -(-len(order) // 3)
        ranks = ["best"] * third + ["median"] * (len(order) - 2 * third) + ["worst"] * third
        return list(zip(ranks, order, strict=False))
    middle = (len(order) - each) // 2
    parts = {"best": order[:each], "median": order[middle : middle + each], "worst": order[-each:]}
    return [(rank, number) for rank, numbers in parts.items() for number in numbers]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _choice(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _draw(given: argparse.Namespace, drawing: Drawing, device: str) -> dict[str, Any]:
    """Draw what the run makes of the data's conditions; return all that the pictures depend on.

    Raises:
        FileNotFoundError: there is no such run, or no data.
        ValueError: the run learned no control, other pictures are in the folder, or a pair has no condition.
    """
    run = read_run(given.run)
    if run.control is None:
        raise ValueError(f"{given.run} learned no control: a run of train_controlnet.py is needed")
    settings = {name: value for name, value in asdict(drawing).items() if name != "batch_size"}
    facts = {"run": run.provenance.config_hash, "step": run.provenance.step, **settings}
    marker = given.generated / "drawn.json"
    if given.generated.exists() and (not marker.is_file() or read_json(marker, dict) != facts):
        raise ValueError(f"{given.generated} holds pictures that were drawn otherwise: name another --generated folder")
    write_text(marker, json.dumps(facts))
    draw_samples(
        load_run(given.run, device), run, read_pairs(given.data, given.allow_outside_paths), given.generated, drawing
    )
    return facts


def _real_images(folder: Path, control: Generated) -> list[Path]:
    """The pictures of the folder; what of it cannot be read is added to ``control.refused``.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: it has no readable picture.
    """
    found = read_pictures(folder)
    if not found.paths:
        raise ValueError(
            f"--fid_originals {folder} has no readable picture directly in it: name a folder of real images"
        )
    control.refused |= found.refused
    return found.paths


def score_asked(
    given: argparse.Namespace, drawing: Drawing, output_dir: Path, title: str
) -> tuple[ControlScores, dict[str, str]]:
    """Draw with a run, where one is named, and score what a command line asks for.

    Args:
        given: the command line of :mod:`ether_diffusion.cli.programs.control_accuracy`.
        drawing: how to draw with a run.
        output_dir: for scores and report.
        title: of the report.

    Returns:
        The scores; and what was not scored, or not in full, with the reason.

    Raises:
        ImportError: a package is missing.
        OSError: a folder, a run or a judge is missing.
        ValueError: what is asked for does not go together.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = None if given.run is None else _draw(given, drawing, device)
    read_samples(given.generated)  # a wrong path shows before the judges are loaded
    control = read_generated(given.data, given.generated, given.task == "segmentation", given.allow_outside_paths)
    unrelated = None if given.fid_originals is None else _real_images(given.fid_originals, control)
    if given.from_originals:
        control.pairs = [replace(pair, condition=None) for pair in control.pairs]
    scores = score_folders(
        control,
        given.generated,
        task_of(given, device),
        output_dir,
        title,
        given.clip,
        given.fid_features,
        unrelated,
        given.kid_subset_size,
        device,
        show=True,
        drawn=drawn,
    )
    return scores, control.refused
