"""A scene is its attributes; :func:`draw` turns them into a picture, a semantic map and edges."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from ether_diffusion.playground.world.backgrounds import paint_background
from ether_diffusion.playground.world.canvas import Canvas, Map
from ether_diffusion.playground.world.looks import Look, marks
from ether_diffusion.playground.world.objects import ANATOMIES, KINDS, Paint, wear
from ether_diffusion.playground.world.palette import INK, PALETTE, RGB, jitter, mix
from ether_diffusion.playground.world.regions import Region
from ether_diffusion.playground.world.shapes import Point, place

_FIXED: dict[Paint, RGB] = {
    Paint.INK: INK,
    Paint.WHITE: (255, 255, 255),
    Paint.METAL: (168, 176, 188),
    Paint.WOOD: (128, 82, 50),
    Paint.GLASS: (176, 222, 244),
}


@dataclass(frozen=True)
class SceneObject:
    """An object in a scene.

    Attributes:
        kind: class word, one of ``KINDS``.
        look: its colours, pattern and added parts.
        centre: x and y in pixels from the top left corner.
        size: half of its height in pixels, without what it wears.
        tilt: degrees clockwise.
        flip: whether it is mirrored.

    Raises:
        ValueError: no such class, or the class has no place for one of the look's parts.
    """

    kind: str
    look: Look
    centre: Point
    size: float
    tilt: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no such class: {self.kind!r}; there are {', '.join(KINDS)}")
        misfits = [part for part in self.look.parts if not ANATOMIES[self.kind].wearable(part)]
        if misfits:
            raise ValueError(f"a {self.kind} has no place for {misfits}")


@dataclass(frozen=True)
class Scene:
    """All attributes of a picture; equal scenes are drawn equal, byte for byte.

    Attributes:
        background: one of ``BACKGROUNDS``.
        objects: from left to right, in drawing order; mostly one.
        tint: palette colour of the background's sky or wall, None for its own.
        variation: what is left to chance within these attributes: the clouds' places, the colours' exact shades.
    """

    background: str
    objects: tuple[SceneObject, ...] = ()
    tint: str | None = None
    variation: int = 0


@dataclass(frozen=True)
class Drawing:
    """A drawn scene.

    Attributes:
        image: RGB, 64 x 64 pixels.
        semantic_map: (64, 64) uint8 of :class:`Region` ids, from the picture's own polygons.
        edges: (64, 64) uint8, 255 on the regions' borders and the objects' contours, else 0.
    """

    image: Image.Image
    semantic_map: Map
    edges: Map


def draw(scene: Scene) -> Drawing:
    """Draw a scene, a pure function of its attributes.

    Raises:
        ValueError: no such background, or it does not come in that tint.
    """
    canvas = Canvas()
    paint_background(canvas, scene.background, scene.tint, random.Random(f"background {scene.variation}"))
    for index, item in enumerate(scene.objects):
        _paint_object(canvas, item, random.Random(f"object {index} {scene.variation}"))
    semantic_map = canvas.semantic_map()
    return Drawing(canvas.picture(), semantic_map, canvas.edges(semantic_map))


def _paint_object(canvas: Canvas, item: SceneObject, dice: random.Random) -> None:
    anatomy, look, region = ANATOMIES[item.kind], item.look, Region[item.kind.upper()]
    coat, second, accent = (jitter(PALETTE[name or "white"], dice) for name in (look.colour, look.second, look.accent))
    colours = _FIXED | {
        Paint.SHADE: mix(coat, (30, 20, 60), 0.22),
        Paint.SHINE: mix(coat, (255, 255, 255), 0.45),
        Paint.ACCENT: accent,
    }
    where = (item.centre, item.size, item.tilt, item.flip)
    sheet = canvas.texture(coat, tuple(place(mark, *where) for mark in marks(look.pattern, look.angle)), second)
    pieces = [*anatomy.pieces, *(piece for part in look.parts for piece in wear(anatomy, part))]
    for piece in pieces:
        polygon = place(piece.polygon, *where)
        if piece.paint is Paint.COAT:
            canvas.cover(polygon, sheet, region)
        else:
            canvas.fill(polygon, colours[piece.paint], region)
        if piece.outlined:
            canvas.outline(polygon, 0.6 + 0.05 * item.size, region)
