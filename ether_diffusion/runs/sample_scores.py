"""Scores of a run's samples while it trains: one row for each step."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ether_diffusion.metrics.scoring import Judges, References
from ether_diffusion.playground.world import known_subject, request_of, true_pictures
from ether_diffusion.runs.choosing import ScoredStep
from ether_diffusion.runs.rare_token import rare_token
from ether_diffusion.runs.record import Run
from ether_diffusion.runs.scores import among_references, sample_means

TRUTHS = 4
"""True pictures of each prompt that samples are compared with, where the truth is known."""


def references_of(run: Run, judges: Judges) -> References:
    """The subject's own pictures as the judges see them, and true pictures of the prompts where they are known.

    Raises:
        UnreadableImageError, OSError: a picture cannot be read.
    """
    paths = [Path(path) for path in run.provenance.instance_images]
    return References(paths, judges, true_answers(paths, [prompt["prompt"] for prompt in run.prompts]))


def true_answers(pictures: list[Path], prompts: list[str]) -> dict[str, list[Image.Image]]:
    """From each prompt whose true pictures are known to these; only a subject of the playground has any.

    Args:
        pictures: the subject's own pictures, by which a subject of the playground is recognised.
        prompts: of the samples, with the rare word.
    """
    individual = known_subject(pictures)
    if individual is None:
        return {}
    requests = {prompt: request_of(individual, prompt) for prompt in prompts}
    return {prompt: true_pictures(individual, asked, TRUTHS) for prompt, asked in requests.items() if asked}


def score_step(run: Run, step: int, references: References, judges: Judges) -> ScoredStep:
    """The means over the samples of a step.

    Args:
        run: which has samples of it.
        step: 0 for the base.
        references: of :func:`references_of`.
        judges: who scores.

    Raises:
        UnreadableImageError, OSError: a sample cannot be read.
    """
    means = sample_means(run, step, references, judges, rare_token(run))
    among = among_references(references, judges)
    row: ScoredStep = {
        "step": step,
        "dino": means["dino"],
        "dino_nearest": means["dino_nearest"],
        "clip_t": means.get("clip_t", means["clip_t_written"]),
    }
    if "truth" in means:
        row["truth"] = means["truth"]
    if among:
        row["references"], row["references_nearest"] = among["dino"], among["dino_nearest"]
    return row
