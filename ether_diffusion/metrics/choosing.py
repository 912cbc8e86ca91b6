"""Which of several trainings or steps is the best for a user who does not know the true pictures.

Likeness to the references alone would choose copies of them, so a result counts only if it still follows its prompts.
"""

from __future__ import annotations


def rank(likeness: float, prompt: float | None, floor: float | None) -> tuple[bool, float]:
    """A key of which the greatest is the best result.

    Results whose prompt score is at least ``floor`` come first, the one with the highest likeness above all. Where no
    result reaches the floor, the one that follows its prompts best is above the others.

    Args:
        likeness: DINO between samples and references.
        prompt: CLIP-T of the samples; None where nobody measured it, and then the floor does not apply.
        floor: the least CLIP-T that counts, a share of the base's; None for no floor.
    """
    if floor is None or prompt is None or prompt >= floor:
        return True, likeness
    return False, prompt
