"""The best step of a run, by the scores that its samples got while it trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from ether_diffusion.metrics.choosing import rank

SAMPLE_SCORES = "sample_scores.jsonl"
"""In a run folder: a line for each step whose samples were scored."""
BEST = "best"
"""In a run folder, and in its checkpoints: the folder with the adapter of the best step so far."""
KEPT_CLIP_T = 0.9
"""Share of the base's CLIP-T that a step's samples must keep to be the best by likeness."""


class ScoredStep(TypedDict):
    """One line of ``sample_scores.jsonl``: means over the samples of a step; step 0 is the base.

    Attributes:
        step: of the training.
        dino: likeness, DINO between samples and references.
        dino_nearest: copying, DINO between each sample and the reference that is nearest to it.
        clip_t: CLIP-T, of the prompts without the rare word where it is known.
        truth: DINO between samples and true pictures of what their prompts ask for, on the playground.
        references: likeness of the references among themselves, where there are several.
        references_nearest: the same of each reference and the one that is nearest to it.
    """

    step: int
    dino: float
    dino_nearest: float
    clip_t: float
    truth: NotRequired[float]
    references: NotRequired[float]
    references_nearest: NotRequired[float]


def prompt_floor(rows: Sequence[ScoredStep]) -> float | None:
    """The least CLIP-T of a step that counts; None where the base's samples were not scored."""
    base = next((row["clip_t"] for row in rows if row["step"] == 0), None)
    return None if base is None else KEPT_CLIP_T * base


def best_step(rows: Sequence[ScoredStep]) -> int | None:
    """The step with the highest likeness among those that keep :data:`KEPT_CLIP_T` of the base's CLIP-T.

    If no step keeps it, the one with the highest CLIP-T; of equal steps the earliest. A later row changes the answer
    only to its own step, so the best adapter can be kept while the run trains.

    Args:
        rows: the scored steps in any order.

    Returns:
        None before the first scored step, and where the base's samples were not scored.
    """
    floor = prompt_floor(rows)
    trained = [row for row in rows if row["step"] > 0]
    if floor is None or not trained:
        return None
    return max(trained, key=lambda row: (rank(row["dino"], row["clip_t"], floor), -row["step"]))["step"]


def steps_since_best(rows: Sequence[ScoredStep]) -> int:
    """How many scored steps came after the best one; 0 where there is none."""
    best = best_step(rows)
    return 0 if best is None else sum(row["step"] > best for row in rows)
