"""The judges, as the command lines of programs ask for them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ether_diffusion.metrics.names import (
    CLIP,
    DEPTH,
    DETECTORS,
    DINO,
    IGNORE_INDEX,
    LPIPS_SIZE,
    SCALES,
    SEGMENTER,
)
from ether_diffusion.ranges import AMOUNT, COUNT, OFFSET, Range

if TYPE_CHECKING:
    from ether_diffusion.metrics.scoring import Judges

NONE = "none"
"""Stands for nothing on a command line."""


def add_judges(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the judges."""
    parser.add_argument("--dino", default=DINO, help="Hub id, folder or playground (default: %(default)s)")
    parser.add_argument("--clip", default=CLIP, help="likewise, or anytorch:ViT-L/14 (default: %(default)s)")
    parser.add_argument("--lpips", metavar="TRUNK", help="file of AlexNet's weights, or lpips; no LPIPS without it")
    parser.add_argument("--lpips_net", choices=("alex", "vgg"), default="alex")
    parser.add_argument(
        "--lpips_size", type=Range(16).of(int), default=LPIPS_SIZE, help="pixels (default: %(default)s)"
    )


def judges_of(given: argparse.Namespace) -> Judges:
    """The judges that the flags of :func:`add_judges` name, on the GPU if there is one.

    Raises:
        ImportError: a package is missing.
        OSError: a model cannot be loaded.
        ValueError: the trunk's weights are of another net.
    """
    import torch

    from ether_diffusion.metrics.judges import load_judges

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_judges(given.dino, given.clip, given.lpips, given.lpips_net, given.lpips_size, device)


def add_judging(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all tasks of control but ``--task``, ``--resize`` and ``--generated``.

    :func:`~ether_diffusion.metrics.control_tasks.flags.task_of` reads them.
    """
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


def _index(text: str) -> int | None:
    return None if text == NONE else int(text)
