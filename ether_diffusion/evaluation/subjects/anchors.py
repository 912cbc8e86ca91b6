"""The floors and ceilings of a benchmark: arms that train nothing, so that every column of a table has its scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from ether_diffusion.evaluation.subjects.protocols import Subject
from ether_diffusion.images import list_images, load_image
from ether_diffusion.runs.drawing import Asked

BASE = "base"
"""The base model itself, asked the same prompts."""
TRUTH = "truth"
"""True pictures of what is asked, other ones than those that the score compares with: a perfect model."""
COPIES = "copies"
"""The references, whatever is asked: a model that has learnt them by heart."""
NOISE = "noise"
"""Uniform noise."""

Answer = Callable[[Asked, Subject], Iterator[Image.Image]]
"""From what is asked and the subject to the pictures."""


def true_answers(asked: Asked, subject: Subject) -> Iterator[Image.Image]:
    """To each of the subject's own prompts one of its ``answers``, by the seed that is asked."""
    each = len(asked.prompts) // len(subject.answers)
    for number, seed in enumerate(asked.seeds):
        answers = subject.answers[number // each]
        yield load_image(answers[seed % len(answers)])


def copied_answers(asked: Asked, subject: Subject) -> Iterator[Image.Image]:
    """The references in turn."""
    references = list_images(subject.references)
    for number in range(len(asked.prompts)):
        yield load_image(references[number % len(references)])


def noisy_answers(asked: Asked, subject: Subject) -> Iterator[Image.Image]:
    """Uniform noise of the first reference's size, from the seeds that are asked."""
    width, height = load_image(list_images(subject.references)[0]).size
    for seed in asked.seeds:
        pixels = np.random.default_rng(seed % 2**63).integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield Image.fromarray(pixels)


ANSWERS: dict[str, Answer] = {TRUTH: true_answers, COPIES: copied_answers, NOISE: noisy_answers}
"""The anchors that no model draws."""
ANCHORS = {
    BASE: "the base model",
    TRUTH: "other drawings of what is asked",
    COPIES: "the references, whatever is asked",
    NOISE: "uniform noise",
}
"""All of them, and what they are."""


def anchors_of(subject: Subject) -> list[str]:
    """The anchors of a subject; without a known truth there is none of :data:`TRUTH`."""
    return [name for name in ANCHORS if name != TRUTH or subject.truths]
