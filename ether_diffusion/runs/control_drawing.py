"""How pictures are drawn under a control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ether_diffusion.ranges import AMOUNT, COUNT, SEED, Range


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
        samples: for each condition.
        batch_size: pictures at a time.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; both of its branches see the control.
        strength: factor of the control.
        seed: of all noise.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        "samples": COUNT,
        "batch_size": COUNT,
        "num_inference_steps": COUNT,
        "guidance_scale": AMOUNT,
        "strength": AMOUNT,
        "seed": SEED,
    }

    samples: int = 4
    batch_size: int = 8
    num_inference_steps: int = 50
    guidance_scale: float = 9.0
    strength: float = 1.0
    seed: int = 0
