"""What a pixel of a semantic map can be."""

from __future__ import annotations

from enum import IntEnum


class Region(IntEnum):
    """The ids of the semantic map: the parts of the backgrounds, then the eight object classes.

    Decorations belong to what they lie on: the sun and snowflakes to the sky, flowers to the grass, the moon to the
    night sky. Whatever an object wears belongs to the object.
    """

    SKY = 0
    CLOUD = 1
    GRASS = 2
    SEA = 3
    SAND = 4
    NIGHT_SKY = 5
    HILL = 6
    SNOW = 7
    BRICK = 8
    BALL = 9
    BOX = 10
    STAR = 11
    HEART = 12
    TREE = 13
    HOUSE = 14
    FISH = 15
    ROBOT = 16
