"""Do images keep to edges? F1 and IoU of canny's, MS-SSIM of soft ones (HED, line art)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ether_diffusion.metrics.backbones import Picture, as_rgb
from ether_diffusion.metrics.names import DETECTORS, SCALES

EdgeDetector = Callable[[Picture], Image.Image]
"""From a picture, or its path, to its soft edges, at any size, as a grey or RGB picture."""
ANNOTATORS = "lllyasviel/Annotators"
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""The weights of the scales from the finest on: Wang et al., Multi-scale structural similarity (2003)."""
WINDOW = 11
"""Pixels of MS-SSIM's Gaussian window."""


def edge_agreement(edges: NDArray[np.bool_], reference: NDArray[np.bool_]) -> dict[str, float]:
    """``f1`` = 2 TP / (2 TP + FP + FN) and ``iou`` = TP / (TP + FP + FN) of edge pixels; 1 where neither has any.

    There is no tolerance: an edge that is one pixel aside is missed.

    Args:
        edges: of the generated picture, (H, W).
        reference: of the condition, (H, W).

    Raises:
        ValueError: the sizes differ.
    """
    _check_sizes(edges, reference)
    both, either = int((edges & reference).sum()), int((edges | reference).sum())
    if not either:
        return {"f1": 1.0, "iou": 1.0}
    return {"f1": 2 * both / (both + either), "iou": both / either}


def ms_ssim(edges: NDArray[np.uint8], reference: NDArray[np.uint8], scales: int = SCALES) -> float:
    """Multi-scale structural similarity of two grey pictures (H, W) of 8 bits, by torchmetrics; 1 if they are equal.

    Args:
        edges: of the generated picture.
        reference: of the condition.
        scales: of Wang et al.'s five, the finest ones; fewer have their weights raised to add up to one.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: the sizes differ, or the pictures are too small for so many scales.
    """
    _check_sizes(edges, reference)
    fitting = greatest_scales(min(edges.shape))
    if not 1 <= scales <= len(BETAS) or scales > fitting:
        raise ValueError(
            f"MS-SSIM of {edges.shape[1]} x {edges.shape[0]} pixels has 1 to {fitting} scales, not {scales}; "
            f"--ms_ssim_scales {fitting} fits"
        )
    try:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
    except ImportError as error:
        raise ImportError(f"MS-SSIM needs torchmetrics ({error}): pip install 'ether-diffusion[eval]'") from error
    if np.array_equal(edges, reference):
        return 1.0  # by definition; the rounding of flat areas would miss it by a hair
    betas = tuple(beta / sum(BETAS[:scales]) for beta in BETAS[:scales])
    seen, real = (torch.from_numpy(each.astype(np.float64) / 255)[None, None] for each in (edges, reference))
    value = multiscale_structural_similarity_index_measure(seen, real, data_range=1.0, kernel_size=WINDOW, betas=betas)
    return torch.as_tensor(value).item()


def greatest_scales(side: int) -> int:
    """The scales that MS-SSIM's window fits into and that torchmetrics accepts, for the shorter side in pixels."""
    shrunk = {scales: side // max(2 ** (scales - 1), (scales - 1) ** 2) for scales in range(1, SCALES + 1)}
    return max([scales for scales, pixels in shrunk.items() if pixels >= WINDOW], default=1)


def _check_sizes(edges: NDArray[Any], reference: NDArray[Any]) -> None:
    if edges.shape != reference.shape:
        raise ValueError(f"edges of {edges.shape} pixels cannot be compared with edges of {reference.shape}")


def load_edge_detector(name: str, device: torch.device | str = "cpu", weights: str = ANNOTATORS) -> EdgeDetector:
    """A detector of controlnet_aux, with the picture's shorter side as its resolution.

    Args:
        name: hed, lineart or lineart_anime.
        device: where to compute.
        weights: Hub id, or the folder of its weights.

    Raises:
        ImportError: controlnet_aux is not installed.
        OSError: the weights cannot be fetched.
        ValueError: there is no detector of that name.
    """
    if name not in DETECTORS:
        raise ValueError(f"there is no edge detector {name!r}; there are {', '.join(DETECTORS)}")
    try:
        import controlnet_aux
    except ImportError as error:
        raise ImportError(
            f"the detector {name} needs controlnet_aux ({error}): pip install controlnet-aux, or give the folder of "
            "edges that were drawn before"
        ) from error
    detector = getattr(controlnet_aux, DETECTORS[name]).from_pretrained(weights).to(device)

    def detect(picture: Picture) -> Image.Image:
        image = as_rgb(picture)
        side = min(image.size)
        found: Image.Image = detector(image, detect_resolution=side, image_resolution=side)
        return found

    return detect
