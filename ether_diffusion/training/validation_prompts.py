"""What a run draws to show how it is getting on, where the user names no prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.playground import GUIDANCE
from ether_diffusion.playground.world import BACKGROUNDS, known_subject, where_phrases

LIVING = frozenset(
    (
        *(
            "animal",
            "pet",
            "cat",
            "kitten",
            "dog",
            "puppy",
            "bird",
            "parrot",
            "chicken",
            "duck",
            "horse",
            "pony",
            "cow",
        ),
        *("rabbit", "hamster", "mouse", "fox", "wolf", "bear", "lion", "tiger", "monkey", "sheep", "goat", "pig"),
        *("person", "man", "woman", "boy", "girl", "child", "baby", "face", "portrait"),
    )
)
"""Words for what is alive."""
PLACES = ("in the snow", "on a beach")
"""Where anything can be."""
OBJECT, ALIVE = "on a wooden table", "wearing a red hat"
"""What only a thing, and only a living being, is likely to do."""
DRAWN = 3
"""Requests, or backgrounds, of the playground that are asked for."""


def default_prompts(instance_prompt: str, class_prompt: str | None, base: str, pictures: Sequence[Path]) -> list[str]:
    """The training prompt, and three scenes that the photos are unlikely to show.

    A prompt that copies of the photos answer as well cannot show overfitting. The playground knows its own places only;
    of its subjects the true answers are known.

    Args:
        instance_prompt: of the photos.
        class_prompt: of the class; either prompt may say that the subject is alive.
        base: the base model, by name.
        pictures: the photos.

    Raises:
        UnreadableImageError, OSError: a photo of the playground's cannot be read.
    """
    if base in GUIDANCE:
        return [instance_prompt, *_drawn(instance_prompt, pictures)]
    words = set(re.findall(r"[a-z]+", f"{instance_prompt} {class_prompt or ''}".lower()))
    return [f"{instance_prompt}{more}" for more in ("", *(f" {each}" for each in (*PLACES, _own(words))))]


def _own(words: set[str]) -> str:
    return ALIVE if words & LIVING else OBJECT


def _drawn(instance_prompt: str, pictures: Sequence[Path]) -> list[str]:
    """Requests of a subject of the playground, whose token stands before the class word; places for any other."""
    individual = known_subject(pictures)
    named = individual and re.search(rf"(\S+) {individual.class_word}\b", instance_prompt)
    if individual and named:
        return [request.prompt.format(token=named[1]) for request in individual.requests[:DRAWN]]
    return [f"{instance_prompt} {where_phrases(background)[0]}" for background in BACKGROUNDS[:DRAWN]]
