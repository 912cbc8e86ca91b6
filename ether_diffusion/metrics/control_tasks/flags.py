"""The task that control accuracy is measured by, from the flags of a command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ether_diffusion.control.conditions import CANNY_HIGH, CANNY_LOW
from ether_diffusion.images import load_image
from ether_diffusion.metrics.backbones import Picture
from ether_diffusion.metrics.control_tasks.base import ControlTask
from ether_diffusion.metrics.control_tasks.depth import Depth
from ether_diffusion.metrics.control_tasks.edges import Canny, SoftEdges
from ether_diffusion.metrics.control_tasks.landmarks import Landmarks
from ether_diffusion.metrics.control_tasks.segmentation import Segmentation
from ether_diffusion.metrics.depth import DepthEstimator
from ether_diffusion.metrics.edges import EdgeDetector, load_edge_detector
from ether_diffusion.metrics.landmarks import load_face_alignment
from ether_diffusion.metrics.names import DETECTORS
from ether_diffusion.metrics.segmentation import Segmenter


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
    """The task that the flags of a command line name, its judge loaded.

    Raises:
        ImportError: a package is missing.
        OSError: a model cannot be loaded.
        ValueError: a setting is impossible.
    """
    return MAKERS[given.task](given, device)


def _segmentation(given: argparse.Namespace, device: str) -> ControlTask:
    return Segmentation(Segmenter(given.segmenter, device), given.label_offset, given.ignore_index, given.resize)


def _canny(given: argparse.Namespace, device: str) -> ControlTask:
    low, high = given.canny or (CANNY_LOW, CANNY_HIGH)
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


MAKERS: dict[str, Callable[[argparse.Namespace, str], ControlTask]] = {
    "segmentation": _segmentation,
    "canny": _canny,
    "edges": _edges,
    "depth": _depth,
    "landmarks": _landmarks,
}
"""One for each of :data:`~ether_diffusion.metrics.names.TASKS`."""
