"""Which captions are true of which scenes, as numbers to compare: what a contrastive batch must not push apart."""

from __future__ import annotations

import hashlib

from ether_diffusion.playground.world import Scene, short_captions

MEANINGS = 5
"""Meanings a caption can have: all attributes, classes, classes and coats, classes and background, background."""
_OF_SHORT = (1, 1, 2, 2, 3, 4)
"""The meaning of each of the world's short captions."""


def scene_meanings(scene: Scene) -> tuple[int, ...]:
    """The ``MEANINGS`` statements true of a scene, as 63-bit hashes; equal statements have equal numbers.

    The first holds every look but no sizes or places: captions that differ in nothing but "small" count as equal.
    """
    kinds = tuple(item.kind for item in scene.objects)
    looks = tuple((item.kind, item.look) for item in scene.objects)
    coats = tuple((item.kind, item.look.colour, item.look.second) for item in scene.objects)
    ground = (scene.background, scene.tint)
    if not scene.objects:
        return (_hash("background", ground),) * MEANINGS
    statements = (("all", looks, ground), ("kinds", kinds), ("coats", coats), ("where", kinds, ground))
    return (*(_hash(*statement) for statement in statements), _hash("background", ground))


def caption_meaning(scene: Scene, caption: str) -> int:
    """Which of :func:`scene_meanings` a caption of the scene states."""
    meanings, shorts = scene_meanings(scene), short_captions(scene)
    if not scene.objects or caption not in shorts:
        return meanings[0]
    return meanings[_OF_SHORT[shorts.index(caption)]]


def _hash(*statement: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(statement).encode()).digest()[:8], "little") >> 1
