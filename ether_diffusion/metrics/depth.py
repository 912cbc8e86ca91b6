"""Do images keep to a depth map? RMSE of depth on 0 to 255."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import AutoModelForDepthEstimation

from ether_diffusion.metrics.backbones import Picture
from ether_diffusion.metrics.dense import DenseModel
from ether_diffusion.metrics.names import DEPTH
from ether_diffusion.playground import NAME


class DepthEstimator(DenseModel):
    """Any depth estimation model of transformers: DPT, Depth Anything, GLPN …

    Args:
        name: Hub id or folder; the playground has none.
        device: where to compute.

    Raises:
        OSError: there is no such model, or it cannot be fetched.
        ValueError: it is no depth model, or its file lacks weights.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        if name == NAME:
            raise ValueError(
                f"the playground is flat: it has no judge of depth; a Hub id such as {DEPTH} or a folder is"
            )
        loaders: dict[Any, tuple[str, ...]] = {AutoModelForDepthEstimation: ("ForDepthEstimation",)}
        super().__init__(name, name, loaders, "depth estimation", device)

    def maps(self, images: Sequence[Picture], show: str | None = None) -> Iterator[NDArray[np.float32]]:
        """The depth of each image at its own size, (H, W), scaled by :func:`to_8_bit_range`."""
        for outputs, sizes in self.outputs(images, show):
            depth = outputs.predicted_depth[:, None].float()
            depth = F.interpolate(depth, sizes[0], mode="bicubic", align_corners=False)[:, 0]
            yield from (to_8_bit_range(each.cpu().numpy()) for each in depth)


def to_8_bit_range(depth: NDArray[np.float32]) -> NDArray[np.float32]:
    """One image's depth moved and stretched so that it goes from 0 to 255; zeros if it is the same everywhere.

    Models such as DPT know depth up to a factor and a shift; so this compares shapes, not distances.
    """
    low, high = float(depth.min()), float(depth.max())
    if high == low:
        return np.zeros_like(depth, np.float32)
    return ((depth - low) * (255 / (high - low))).astype(np.float32)


def depth_rmse(depth: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """√(mean over pixels of (depth - reference)²), both (H, W) on 0 to 255: 0 if they are equal.

    Raises:
        ValueError: the sizes differ.
    """
    if depth.shape != reference.shape:
        raise ValueError(f"a depth of {depth.shape} pixels cannot be compared with one of {reference.shape}")
    return float(np.sqrt(np.mean(np.square(depth.astype(np.float64) - reference.astype(np.float64)))))
