"""Control accuracy of pictures, drawn by a run or there already: do they keep to maps, edges, depth, landmarks?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ether_diffusion.arguments import Parser
from ether_diffusion.first_imports import first_imports
from ether_diffusion.logs import show_study_logs
from ether_diffusion.metrics.names import CLIP, DEPTH, DETECTORS, IGNORE_INDEX, INCEPTION, SCALES, SEGMENTER, TASKS
from ether_diffusion.ranges import AMOUNT, COUNT, OFFSET, Range
from ether_diffusion.runs.control_drawing import Drawing

NONE = "none"
"""Stands for nothing on a command line."""


def _index(text: str) -> int | None:
    if text == NONE:
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no id: give a whole number, or {NONE}") from None


def _name(text: str) -> str | None:
    return None if text == NONE else text


def _add_judging(parser: Parser) -> None:
    """Add the flags that only some tasks have."""
    maps = parser.add_argument_group("segmentation")
    maps.add_argument(
        "--segmenter",
        default=SEGMENTER,
        help="Hub id, folder or playground (default: %(default)s; others on ADE20K: openmmlab/upernet-swin-large, "
        "facebook/mask2former-swin-large-ade-semantic)",
    )
    maps.add_argument(
        "--label_offset",
        type=OFFSET.of(int),
        help="the maps' id of the segmenter's class 0; lower ids are left out. Default: as its image processor says, "
        "1 for those of ADE20K",
    )
    maps.add_argument(
        "--ignore_index", type=_index, default=IGNORE_INDEX, help="id that is left out, or none (default: %(default)s)"
    )
    edges = parser.add_argument_group("edges")
    edges.add_argument(
        "--canny",
        type=AMOUNT.of(float),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="thresholds (default: 100 200, ControlNet's)",
    )
    edges.add_argument(
        "--edges", default="hed", help=f"{', '.join(DETECTORS)}, or a folder of edges under the pictures' names"
    )
    edges.add_argument("--ms_ssim_scales", type=COUNT.of(int), default=SCALES, help="default: %(default)s")
    parser.add_argument("--depth", default=DEPTH, help="judge of depth: Hub id or folder (default: %(default)s)")


def _parser() -> Parser:
    parser = Parser(
        description="How well generated pictures keep to semantic maps, edges, depth or landmarks.",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="originals and conditions, with their metadata.jsonl")
    add(
        "--allow_outside_paths",
        action="store_true",
        help='take files that the listing of --data names outside of its folder, by absolute paths or ".."',
    )
    add("--generated", type=Path, help="pictures, with a metadata.jsonl that names the pair of each")
    add("--run", type=Path, help="draw the pictures with this run of train_controlnet.py, into --generated if named")
    add("--task", choices=TASKS, required=True)
    add("--output_dir", type=Path, help="default: beside the generated folder, with -control added")
    add("--from_originals", action="store_true", help="compute all conditions from the originals, not from files")
    add("--resize", action="store_true", help="bring conditions and originals of another size to the picture's")
    add(
        "--clip",
        type=_name,
        default=CLIP,
        help="judge of CLIP-T: Hub id, folder, playground, or none (default: %(default)s)",
    )
    add(
        "--fid_features",
        type=_name,
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
    add("--kid_subset_size", type=Range(2).of(int), help="default: 1000, or all of the smaller set")
    drawing = parser.add_argument_group("drawing with --run")
    for setting in fields(Drawing):
        kind = Drawing.RANGES[setting.name].of(int if isinstance(setting.default, int) else float)
        drawing.add_argument(f"--{setting.name}", type=kind, default=setting.default, help="default: %(default)s")
    _add_judging(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: score a folder, print the table, and name what was not scored.

    Raises:
        SystemExit: 1 if something was not scored, 2 if nothing could be.
    """
    show_study_logs()
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.generated is None and given.run is None:
        parser.error("name the pictures with --generated, or a run that draws them with --run")
    given.generated = given.generated or given.run / "generated"
    generated = given.generated.resolve()
    output_dir = given.output_dir or generated.with_name(f"{generated.name}-control")
    with first_imports():
        from ether_diffusion.evaluation.controls.accuracy import score_asked, table
        from ether_diffusion.evaluation.tables import judges_line
    drawing = Drawing(**{setting.name: getattr(given, setting.name) for setting in fields(Drawing)})
    try:
        scores, refused = score_asked(given, drawing, output_dir, f"{generated.name}: {given.task}")
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{table(scores)}\n{judges_line(scores.judges)}")
    print(f"{scores.pictures} pictures of {scores.pairs} pairs; report: {output_dir / 'report.html'}")
    for warning in scores.warnings:
        print(f"Note: {warning}")
    if refused:
        print(f"\nNot scored, or not in full ({len(refused)}):")
        print("\n".join(f"  {path}: {reason}" for path, reason in refused.items()))
        raise SystemExit(1)
