"""Control accuracy of pictures, drawn by a run or there already: do they keep to maps, edges, depth, landmarks?"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from ether_diffusion.evaluation.controls.report import write_control_report
from ether_diffusion.evaluation.tables import judges_line
from ether_diffusion.files import write_text
from ether_diffusion.metrics.backbones import load_clip
from ether_diffusion.metrics.control import ControlScores, score_control
from ether_diffusion.metrics.control_tasks import ControlTask
from ether_diffusion.metrics.control_tasks.flags import NONE, TASKS, add_judging, task_of
from ether_diffusion.metrics.distribution import INCEPTION, load_feature_model
from ether_diffusion.metrics.generated import Generated, Sample, read_generated, read_pairs, read_pictures, read_samples
from ether_diffusion.metrics.judges import CLIP
from ether_diffusion.page.text import decimals, markdown_table, number
from ether_diffusion.runs.drawing import Drawing, draw_samples, load_run
from ether_diffusion.runs.record import read_run


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.control_accuracy",
        description="How well generated pictures keep to semantic maps, edges, depth or landmarks.",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="originals and conditions, with their metadata.jsonl")
    add("--generated", type=Path, help="pictures, with a metadata.jsonl that names the pair of each")
    add("--run", type=Path, help="draw the pictures with this run of train_controlnet.py, into --generated if named")
    add("--task", choices=TASKS, required=True)
    add("--output_dir", type=Path, help="default: beside the generated folder, with -control added")
    add("--from_originals", action="store_true", help="compute all conditions from the originals, not from files")
    add("--resize", action="store_true", help="bring conditions and originals of another size to the picture's")
    add("--clip", default=CLIP, help="judge of CLIP-T: Hub id, folder, playground, or none (default: %(default)s)")
    add(
        "--fid_features",
        default=INCEPTION,
        help="of FID and KID: inception, inception:FILE, dino:NAME, clip:NAME, playground or none "
        "(default: %(default)s, which needs torch-fidelity)",
    )
    add(
        "--fid_originals",
        type=Path,
        help="folder of other real images for FID and KID; default: the originals of every second pair, held against "
        "the pictures of the other pairs",
    )
    add("--kid_subset_size", type=int, help="default: 1000, or all of the smaller set")
    drawing = parser.add_argument_group("drawing with --run")
    for setting in fields(Drawing):
        kind, text = (int if isinstance(setting.default, int) else float), "default: %(default)s"
        drawing.add_argument(f"--{setting.name}", type=kind, default=setting.default, help=text)
    add_judging(parser)
    return parser


def _draw(given: argparse.Namespace, device: str) -> dict[str, Any]:
    """Draw what the run makes of the data's conditions; return all that the pictures depend on.

    Raises:
        FileNotFoundError: there is no such run, or no data.
        ValueError: the run learned no control, other pictures are in the folder, or a pair has no condition.
    """
    run = read_run(given.run)
    if run.control is None:
        raise ValueError(f"{given.run} learned no control: a run of train_controlnet.py is needed")
    drawing = Drawing(**{setting.name: getattr(given, setting.name) for setting in fields(Drawing)})
    settings = {name: value for name, value in asdict(drawing).items() if name != "batch_size"}
    facts = {"run": run.provenance.config_hash, "step": run.provenance.step, **settings}
    marker = given.generated / "drawn.json"
    if given.generated.exists() and (not marker.is_file() or json.loads(marker.read_text()) != facts):
        raise ValueError(f"{given.generated} holds pictures that were drawn otherwise: name another --generated folder")
    write_text(marker, json.dumps(facts))
    draw_samples(load_run(given.run, device), run, read_pairs(given.data), given.generated, drawing)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: score a folder, print the table, and name what was not scored.

    Raises:
        SystemExit: 1 if something was not scored, 2 if nothing could be.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.generated is None and given.run is None:
        parser.error("name the pictures with --generated, or a run that draws them with --run")
    given.generated = given.generated or given.run / "generated"
    generated = given.generated.resolve()
    output_dir = given.output_dir or generated.with_name(f"{generated.name}-control")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        drawn = None if given.run is None else _draw(given, device)
        read_samples(given.generated)  # a wrong path shows before the judges are loaded
        control = read_generated(given.data, given.generated, given.task == "segmentation")
        unrelated = None if given.fid_originals is None else _real_images(given.fid_originals, control)
        if given.from_originals:
            control.pairs = [replace(pair, condition=None) for pair in control.pairs]
        scores = score_folders(
            control,
            given.generated,
            task_of(given, device),
            output_dir,
            f"{generated.name}: {given.task}",
            None if given.clip == NONE else given.clip,
            None if given.fid_features == NONE else given.fid_features,
            unrelated,
            given.kid_subset_size,
            device,
            show=True,
            drawn=drawn,
        )
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{table(scores)}\n{judges_line(scores.judges)}")
    print(f"{scores.pictures} pictures of {scores.pairs} pairs; report: {output_dir / 'report.html'}")
    for warning in scores.warnings:
        print(f"Note: {warning}")
    if control.refused:
        print(f"\nNot scored, or not in full ({len(control.refused)}):")
        print("\n".join(f"  {path}: {reason}" for path, reason in control.refused.items()))
        raise SystemExit(1)
