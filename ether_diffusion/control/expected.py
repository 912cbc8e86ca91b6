"""Whether a picture is what a control was trained on, as far as its file says what that was."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ether_diffusion.control.conditions import MAP_PALETTE
from ether_diffusion.pipelines.control_encoder import ControlEncoderConfig

SHOWN_CLASSES = 6
"""Classes that a message names."""
FOREIGN = 0.05
"""Share of a picture's pixels that may have other colours: borders that were interpolated, losses of a format."""
COLOURS = 256
"""A map has at most so many: one for each class id."""
GREYS = 0.4
"""Share of an edge picture's pixels that may be neither black nor white: thin lines that were resized."""


def misfit(condition: Tensor, config: ControlEncoderConfig) -> str | None:
    """What is wrong with a condition for a control: what it expects, and what this is; None where nothing is.

    Args:
        condition: (N, 3, H, W) in [0, 1].
        config: of the control.
    """
    for picture in (condition.detach().cpu().float().numpy().transpose(0, 2, 3, 1) * 255).round().clip(0, 255):
        values = picture.astype(np.uint8)
        found = None
        if config.kind == "canny":
            found = _edges(values)
        elif config.condition == "map":
            found = _map(values, config)
        if found is not None:
            return f"the control expects {expectation(config)}; {found}"
    return None


def expectation(config: ControlEncoderConfig) -> str:
    """What a control was trained on, in words."""
    if config.kind == "canny":
        low, high = config.thresholds or (None, None)
        made = "" if low is None else f", made by canny(image, {low}, {high}) of ether_diffusion.control.conditions"
        return f"canny edges, white on black{made}"
    if config.condition == "map":
        source = " as its segmenter makes them" if config.kind == "segmentation" else ""
        if config.classes is None:
            return f"semantic maps{source}"
        names = ", ".join(config.classes[:SHOWN_CLASSES]) + (", …" if len(config.classes) > SHOWN_CLASSES else "")
        return f"semantic maps{source} of {len(config.classes)} classes ({names}), grey class ids or their colours"
    return "pictures like those that it was trained on"


def _edges(values: NDArray[np.uint8]) -> str | None:
    grey = float(((values > 64) & (values < 192)).any(-1).mean())
    if grey > GREYS:
        return f"{grey:.0%} of this picture are neither black nor white: is it a photo?"
    if (np.ptp(values, -1) > 64).mean() > FOREIGN:
        return "this picture has colours: is it a map, or a photo?"
    white = float((values >= 192).all(-1).mean())
    return f"{white:.0%} of this picture are white: are its colours inverted?" if white > 0.5 else None


def _map(values: NDArray[np.uint8], config: ControlEncoderConfig) -> str | None:
    red, green, blue = values.reshape(-1, 3).astype(np.int64).T
    colours, counts = np.unique((red << 16) + (green << 8) + blue, return_counts=True)
    if len(colours) > COLOURS:
        return f"this picture has {len(colours):,} colours: is it a photo?"
    if config.classes is None:
        return None
    known = [(r << 16) + (g << 8) + b for r, g, b in MAP_PALETTE[: len(config.classes)]]
    foreign = float(counts[~np.isin(colours, known)].sum() / counts.sum())
    return f"{foreign:.0%} of this picture have colours of none of them" if foreign > FOREIGN else None
