"""Two individuals in one scene: what a picture of both would truly be."""

from __future__ import annotations

import random

from ether_diffusion.playground.world.canvas import SIDE
from ether_diffusion.playground.world.sampling import PAIR_SIZES, random_object
from ether_diffusion.playground.world.scene import Scene
from ether_diffusion.playground.world.subjects import Subject


def true_company(first: Subject, second: Subject, background: str, seed: int, index: int) -> Scene:
    """Both subjects on a background, the first on the left, as captions of pairs have them.

    Positions, sizes of pairs, tilts and shades are random: a pure function of the arguments.

    Args:
        first: who stands on the left.
        second: who stands on the right.
        background: one of ``BACKGROUNDS``.
        seed: of a series of scenes.
        index: number of the scene in the series.
    """
    rng = random.Random(f"company {first.name} {second.name} {background} {seed} {index}")
    left = random_object(rng, first.class_word, first.look, PAIR_SIZES, (0, SIDE / 2))
    right = random_object(rng, second.class_word, second.look, PAIR_SIZES, (SIDE / 2, SIDE))
    return Scene(background, (left, right), variation=rng.getrandbits(32))
