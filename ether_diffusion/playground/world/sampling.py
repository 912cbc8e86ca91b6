"""Endless random scenes: every one a pure function of a seed and an index."""

from __future__ import annotations

import random

from ether_diffusion.playground.world.backgrounds import BACKGROUNDS, TINTS
from ether_diffusion.playground.world.canvas import SIDE
from ether_diffusion.playground.world.individuals import reserved
from ether_diffusion.playground.world.looks import ANGLES, GARMENTS, PARTS, PATTERNS, Look
from ether_diffusion.playground.world.objects import ANATOMIES, KINDS
from ether_diffusion.playground.world.palette import COLOURS
from ether_diffusion.playground.world.scene import Scene, SceneObject
from ether_diffusion.playground.world.shapes import Point

EMPTY, TWO = 0.05, 0.15
"""Shares of the scenes without an object and with two; the others have one."""
TINTED, PATTERNED, DRESSED = 0.15, 0.5, 0.3
"""Shares of the scenes with a coloured sky or wall, of the objects with a pattern, of those with added parts."""
SIZES = (10.0, 23.0)
"""Least and greatest size (half height in pixels) of an object that is alone."""
PAIR_SIZES = (9.0, 13.0)
GROUND = 46.0
"""Objects that stand have their feet at least so many pixels from the top: below every horizon."""


def random_scene(seed: int, index: int) -> Scene:
    """The scene number ``index`` of the endless series ``seed``.

    Class, colour and background are uniform. No object has the coat of an individual (:func:`reserved`).
    """
    dice = random.Random(f"scene {seed} {index}")
    background = dice.choice(BACKGROUNDS)
    tint = dice.choice(TINTS[background]) if TINTS[background] and dice.random() < TINTED else None
    kind_of_scene = dice.random()
    objects: tuple[SceneObject, ...]
    if kind_of_scene < EMPTY:
        objects = ()
    elif kind_of_scene < EMPTY + TWO:
        left, right = dice.sample(KINDS, 2)
        half = SIDE / 2
        objects = (
            random_object(dice, left, random_look(dice, left), PAIR_SIZES, (0, half)),
            random_object(dice, right, random_look(dice, right), PAIR_SIZES, (half, SIDE)),
        )
    else:
        kind = dice.choice(KINDS)
        objects = (random_object(dice, kind, random_look(dice, kind), SIZES),)
    return Scene(background, objects, tint, dice.getrandbits(32))


def random_look(dice: random.Random, kind: str) -> Look:
    """A look for an object of class ``kind`` that no individual's coat resembles."""
    colour = dice.choice(COLOURS)
    pattern, second, angle = "plain", None, 0
    if dice.random() < PATTERNED:
        pattern = dice.choice(PATTERNS[1:])
        angle = 0 if pattern == "dotted" else dice.choice(ANGLES)
        second = dice.choice([c for c in COLOURS if c != colour and not reserved(kind, frozenset({colour, c}))])
    parts: tuple[str, ...] = ()
    if dice.random() < DRESSED:
        fitting = [part for part in PARTS if ANATOMIES[kind].wearable(part)]
        parts = (dice.choice(fitting),)
        others = [p for p in fitting if p not in parts and {p, *parts} != {"hat", "antenna"}]
        if others and dice.random() < 0.3:
            parts += (dice.choice(others),)
    garments = set(parts) & set(GARMENTS)
    accent = dice.choice([c for c in COLOURS if c not in (colour, second)]) if garments else None
    return Look(colour, pattern, second, angle, tuple(p for p in PARTS if p in parts), accent)


def random_object(
    dice: random.Random, kind: str, look: Look, sizes: tuple[float, float], columns: tuple[float, float] = (0, SIDE)
) -> SceneObject:
    """Put an object at a random place and size wholly into the picture's ``columns`` (pixels from, to)."""
    size = dice.uniform(*sizes)
    reach = 1.08 * size + 1  # a tilted corner, and the outline
    top, bottom = _headroom(look) * size + 1, SIDE - reach
    if ANATOMIES[kind].stands:
        top = max(top, GROUND - size)
    left, right = columns
    centre: Point = (dice.uniform(left + reach, right - reach), dice.uniform(min(top, bottom), bottom))
    tilt, flip = dice.uniform(-6, 6), ANATOMIES[kind].turns and dice.random() < 0.5
    return SceneObject(kind, look, centre, size, tilt, flip)


def _headroom(look: Look) -> float:
    """How far an object reaches up from its centre, in sizes."""
    return 1.5 if {"hat", "antenna"} & set(look.parts) else 1.08
