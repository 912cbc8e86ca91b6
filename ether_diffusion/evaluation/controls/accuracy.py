"""Control accuracy of pictures, drawn by a run or there already: do they keep to maps, edges, depth, landmarks?"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ether_diffusion.control.conditions import CANNY_HIGH, CANNY_LOW
from ether_diffusion.evaluation.controls.drawing import Drawing, draw_samples
from ether_diffusion.evaluation.controls.generated import Control, Sample, read_control, read_pairs, read_samples
from ether_diffusion.evaluation.controls.report import write_control_report
from ether_diffusion.evaluation.drawing import load_run
from ether_diffusion.evaluation.subjects.folders import read_pictures
from ether_diffusion.evaluation.tables import judges_line
from ether_diffusion.files import write_text
from ether_diffusion.images import load_image
from ether_diffusion.metrics.backbones import Picture, load_clip
from ether_diffusion.metrics.control import ControlScores, score_control
from ether_diffusion.metrics.control_tasks import Canny, ControlTask, Depth, Landmarks, Segmentation, SoftEdges
from ether_diffusion.metrics.depth import DEPTH, DepthEstimator
from ether_diffusion.metrics.distribution import INCEPTION, load_feature_model
from ether_diffusion.metrics.edges import DETECTORS, SCALES, EdgeDetector, load_edge_detector
from ether_diffusion.metrics.judges import CLIP
from ether_diffusion.metrics.landmarks import load_face_alignment
from ether_diffusion.metrics.segmentation import IGNORE_INDEX, SEGMENTER, Segmenter
from ether_diffusion.runs.record import read_run

NONE = "none"


def score_folders(
    control: Control,
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
    """Score what :func:`read_control` found; write ``results.json``, ``scores.jsonl`` and ``report.html``.

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
    lines = ["| score | generated | all as one set | originals |", "|---|---:|---:|---:|"]
    for measure in scores.measures:
        found = scores.scores[measure.key]
        spread = "" if found["spread"] is None else f" ± {found['spread']:.4f}"
        real = scores.originals.get(measure.key)
        cells = [f"{_number(found['mean'])}{spread}", _number(found["overall"]), "" if real is None else _number(real)]
        lines.append(f"| {measure.title} {'↑' if measure.higher_is_better else '↓'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:z.4f}" if abs(value) < 10 else f"{value:z.2f}"


def edge_folder(folder: Path, generated: Path) -> EdgeDetector:
    """Edges that were drawn before: of every picture in ``generated`` under its own path in ``folder``.

    The detector raises FileNotFoundError where they are missing, ValueError for a picture from elsewhere.
    """

    def detect(picture: Picture) -> Image.Image:
        if not isinstance(picture, Path) or not picture.is_relative_to(generated):
            raise ValueError(
                f"{folder} holds the edges of generated pictures only: the data's metadata must name a "
                "conditioning_image for every original"
            )
        return load_image(folder / picture.relative_to(generated))

    return detect


def task_of(given: argparse.Namespace, device: str) -> ControlTask:
    """The task that the flags name, its judge loaded.

    Raises:
        ImportError: a package is missing.
        OSError: a model cannot be loaded.
        ValueError: a setting is impossible.
    """
    return TASKS[given.task](given, device)


def _segmentation(given: argparse.Namespace, device: str) -> ControlTask:
    return Segmentation(Segmenter(given.segmenter, device), given.label_offset, given.ignore_index, given.resize)


def _canny(given: argparse.Namespace, device: str) -> ControlTask:
    low, high = given.canny
    return Canny(low, high, given.resize)


def _edges(given: argparse.Namespace, device: str) -> ControlTask:
    if given.edges in DETECTORS:
        detector, source = load_edge_detector(given.edges, device), f"{given.edges} of controlnet_aux"
    else:
        folder = Path(given.edges)
        if not folder.is_dir():
            raise ValueError(f"--edges {given.edges} is none of {', '.join(DETECTORS)}, and no folder")
        detector, source = edge_folder(folder, given.generated), f"drawn before, {folder.name}"
    return SoftEdges(detector, source, given.ms_ssim_scales, given.resize)


def _depth(given: argparse.Namespace, device: str) -> ControlTask:
    return Depth(DepthEstimator(given.depth, device), given.resize)


def _landmarks(given: argparse.Namespace, device: str) -> ControlTask:
    return Landmarks(load_face_alignment(device), "face-alignment, 68 points, 2D", given.resize)


TASKS: dict[str, Callable[[argparse.Namespace, str], ControlTask]] = {
    "segmentation": _segmentation,
    "canny": _canny,
    "edges": _edges,
    "depth": _depth,
    "landmarks": _landmarks,
}


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
    maps = parser.add_argument_group("segmentation")
    maps.add_argument(
        "--segmenter",
        default=SEGMENTER,
        help="Hub id, folder or playground (default: %(default)s; others on ADE20K: openmmlab/upernet-swin-large, "
        "facebook/mask2former-swin-large-ade-semantic)",
    )
    maps.add_argument(
        "--label_offset",
        type=int,
        help="the maps' id of the segmenter's class 0; lower ids are left out. Default: as its image processor says, "
        "1 for those of ADE20K",
    )
    maps.add_argument(
        "--ignore_index", type=_index, default=IGNORE_INDEX, help="id that is left out, or none (default: %(default)s)"
    )
    edges = parser.add_argument_group("edges")
    edges.add_argument(
        "--canny",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[CANNY_LOW, CANNY_HIGH],
        help="thresholds (default: 100 200, ControlNet's)",
    )
    edges.add_argument(
        "--edges", default="hed", help=f"{', '.join(DETECTORS)}, or a folder of edges under the pictures' names"
    )
    edges.add_argument("--ms_ssim_scales", type=int, default=SCALES, help="default: %(default)s")
    parser.add_argument("--depth", default=DEPTH, help="judge of depth: Hub id or folder (default: %(default)s)")
    return parser


def _index(text: str) -> int | None:
    return None if text == NONE else int(text)


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


def _real_images(folder: Path, control: Control) -> list[Path]:
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
        control = read_control(given.data, given.generated, given.task == "segmentation")
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
