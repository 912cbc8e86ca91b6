"""The six backgrounds; each paints the whole canvas, another variation for every state of the dice."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from ether_diffusion.playground.world.canvas import SIDE, Canvas
from ether_diffusion.playground.world.palette import PALETTE, RGB, jitter, mix
from ether_diffusion.playground.world.regions import Region
from ether_diffusion.playground.world.shapes import Polygon, ellipse, place, rectangle, rounded

WHITE: RGB = (255, 255, 255)

SKY_TINTS = ("orange", "yellow", "green", "purple", "pink")
WALL_TINTS = ("yellow", "green", "blue", "purple", "pink", "white")
TINTS: dict[str, tuple[str, ...]] = {
    "meadow": SKY_TINTS,
    "beach": SKY_TINTS,
    "night": (),
    "clouds": SKY_TINTS,
    "snow": SKY_TINTS,
    "bricks": WALL_TINTS,
}
"""In which palette colours, besides its own, a background's sky or wall may be."""

BACKGROUNDS = tuple(TINTS)
"""The names of the six backgrounds."""


def paint_background(canvas: Canvas, background: str, tint: str | None, dice: random.Random) -> None:
    """Paint the whole ``canvas``; ``tint`` names the colour of the sky or the wall, None its own.

    Raises:
        ValueError: no such background, or it does not come in that tint.
    """
    if background not in TINTS:
        raise ValueError(f"no such background: {background!r}; there are {', '.join(BACKGROUNDS)}")
    if tint is not None and tint not in TINTS[background]:
        raise ValueError(f"{background} does not come in {tint!r}, only in {TINTS[background] or 'its own colours'}")
    _PAINTERS[background](canvas, None if tint is None else PALETTE[tint], dice)


def _sky(canvas: Canvas, own: RGB, tint: RGB | None, dice: random.Random) -> None:
    top = jitter(own if tint is None else mix(tint, WHITE, 0.15), dice)
    canvas.gradient(top, mix(top, WHITE, dice.uniform(0.45, 0.6)), Region.SKY)


def _sun(canvas: Canvas, dice: random.Random) -> None:
    if dice.random() < 0.5:
        centre = (dice.uniform(6, 58), dice.uniform(5, 11))
        canvas.fill(ellipse(*centre, 6.2), (255, 240, 170))
        canvas.fill(ellipse(*centre, 4.4), (255, 222, 90))


def _below(height: float, swing: float, dice: random.Random) -> Polygon:
    """Everything below a wavy line about ``height`` pixels from the top."""
    phase, waves = dice.uniform(0, math.tau), dice.uniform(0.7, 1.6)
    line = [(x, height + swing * math.sin(math.tau * waves * x / SIDE + phase)) for x in range(-2, SIDE + 3, 4)]
    return (*line, (SIDE + 2, SIDE + 2), (-2, SIDE + 2))


def _meadow(canvas: Canvas, tint: RGB | None, dice: random.Random) -> None:
    _sky(canvas, (110, 190, 250), tint, dice)
    _sun(canvas, dice)
    grass = jitter((132, 204, 92), dice)
    horizon = dice.uniform(29, 37)
    canvas.fill(_below(horizon, 3.5, dice), mix(grass, (40, 120, 60), 0.25), Region.GRASS)
    canvas.fill(_below(horizon + 7, 2.5, dice), grass, Region.GRASS)
    for _ in range(dice.randint(7, 11)):
        x, y = dice.uniform(2, 62), dice.uniform(horizon + 12, 62)
        canvas.fill(((x - 1.2, y), (x - 0.6, y - 2.4), (x, y), (x + 0.9, y - 2.2), (x + 1.2, y)), (74, 150, 62))
    for _ in range(dice.randint(6, 10)):
        x, y = dice.uniform(2, 62), dice.uniform(horizon + 11, 62)
        petals = dice.choice(((255, 255, 255), (255, 226, 90), (250, 160, 200)))
        canvas.fill(ellipse(x, y, 1.4, corners=10), petals)
        canvas.fill(ellipse(x, y, 0.5, corners=6), (240, 170, 40))


def _beach(canvas: Canvas, tint: RGB | None, dice: random.Random) -> None:
    _sky(canvas, (120, 200, 250), tint, dice)
    _sun(canvas, dice)
    sea = jitter((34, 140, 190), dice)
    horizon = dice.uniform(21, 27)
    canvas.fill(rectangle(-2, horizon, SIDE + 2, SIDE), sea, Region.SEA)
    for _ in range(dice.randint(5, 8)):
        x, y, width = dice.uniform(0, 60), dice.uniform(horizon + 2, horizon + 10), dice.uniform(3, 7)
        canvas.fill(ellipse(x, y, width, 0.5, corners=10), mix(sea, WHITE, 0.55))
    shore = _below(horizon + dice.uniform(12, 15), 1.8, dice)
    canvas.fill(place(shore, (0, -1.6), 1), WHITE)
    sand = jitter((240, 214, 150), dice)
    canvas.fill(shore, sand, Region.SAND)
    for _ in range(dice.randint(10, 16)):
        x, y = dice.uniform(1, 63), dice.uniform(horizon + 19, 63)
        canvas.fill(ellipse(x, y, dice.uniform(0.6, 1.3), 0.6, corners=8), mix(sand, (150, 110, 60), 0.4))


def _night(canvas: Canvas, tint: RGB | None, dice: random.Random) -> None:
    top = jitter((16, 20, 62), dice)
    canvas.gradient(top, mix(top, (76, 78, 150), 0.7), Region.NIGHT_SKY)
    for _ in range(dice.randint(22, 32)):
        x, y = dice.uniform(1, 63), dice.uniform(1, 46)
        canvas.fill(ellipse(x, y, dice.uniform(0.45, 0.95), corners=8), (255, 250, 215))
    x, y, moon = dice.uniform(8, 56), dice.uniform(8, 13), dice.uniform(4.5, 6)
    canvas.fill(ellipse(x, y, moon), (250, 240, 200))
    if dice.random() < 0.5:
        canvas.fill(ellipse(x + moon * 0.5, y - moon * 0.15, moon * 0.85), mix(top, (76, 78, 150), 0.1))
    canvas.fill(_below(dice.uniform(45, 50), 3, dice), jitter((28, 46, 58), dice), Region.HILL)


def _clouds(canvas: Canvas, tint: RGB | None, dice: random.Random) -> None:
    _sky(canvas, (62, 150, 240), tint, dice)
    count = dice.randint(4, 5)
    for k in range(count):
        x, y = dice.uniform(2, 62), SIDE * (k + dice.uniform(0.25, 0.75)) / count
        width = dice.uniform(9, 13)
        puffs = ((-0.55, 0.1, 0.5, 0.3), (0.55, 0.1, 0.5, 0.3), (-0.15, -0.15, 0.45, 0.42), (0.25, -0.1, 0.4, 0.34))
        for offset, colour in ((1.2, (214, 226, 242)), (0.0, (252, 253, 255))):
            for dx, dy, rx, ry in puffs:
                puff = ellipse(x + dx * width, y + dy * width + offset, rx * width, ry * width, corners=20)
                canvas.fill(puff, colour, Region.CLOUD)


def _snow(canvas: Canvas, tint: RGB | None, dice: random.Random) -> None:
    _sky(canvas, (130, 158, 190), tint, dice)
    horizon = dice.uniform(31, 38)
    canvas.fill(_below(horizon, 3, dice), jitter((214, 226, 242), dice, 5), Region.SNOW)
    canvas.fill(_below(horizon + 8, 2.5, dice), jitter((240, 245, 252), dice, 4), Region.SNOW)
    for _ in range(dice.randint(38, 52)):
        x, y = dice.uniform(0, 64), dice.uniform(0, 64)
        colour = WHITE if y < horizon else (188, 206, 232)
        canvas.fill(ellipse(x, y, dice.uniform(0.6, 1.25), corners=8), colour)


def _bricks(canvas: Canvas, tint: RGB | None, dice: random.Random) -> None:
    brick = jitter((168, 92, 70) if tint is None else mix(tint, (150, 140, 130), 0.22), dice)
    mortar = jitter((214, 204, 192) if tint != PALETTE["white"] else (160, 156, 150), dice)
    canvas.gradient(mortar, mortar, Region.BRICK)
    height, width = dice.uniform(6.6, 8.4), dice.uniform(13, 16)
    top, left = -dice.uniform(0, height), -dice.uniform(0, width)
    for row in range(math.ceil((SIDE - top) / height)):
        y = top + row * height
        for column in range(-1, math.ceil((SIDE - left) / width)):
            x = left + (column + row % 2 / 2) * width
            colour = mix(brick, (60, 50, 50), dice.uniform(0, 0.18))
            canvas.fill(rounded(x, y, x + width - 1.2, y + height - 1.2, 0.6, corners=2), colour)


_PAINTERS: dict[str, Callable[[Canvas, RGB | None, random.Random], None]] = {
    "meadow": _meadow,
    "beach": _beach,
    "night": _night,
    "clouds": _clouds,
    "snow": _snow,
    "bricks": _bricks,
}
