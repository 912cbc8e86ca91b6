"""The eight object classes, each a list of polygons in the square [-1, 1]² (y down), and what they can wear."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from ether_diffusion.playground.world.shapes import (
    Point,
    Polygon,
    ellipse,
    heart,
    rectangle,
    rounded,
    scallop,
    smile,
    star,
)


class Paint(Enum):
    """What a piece is painted with: the coat has the pattern, its shade the coat's first colour darkened."""

    COAT = auto()
    SHADE = auto()
    SHINE = auto()
    ACCENT = auto()
    INK = auto()
    WHITE = auto()
    METAL = auto()
    WOOD = auto()
    GLASS = auto()


@dataclass(frozen=True)
class Piece:
    """One polygon of an object, in drawing order."""

    polygon: Polygon
    paint: Paint
    outlined: bool = True


@dataclass(frozen=True)
class Anatomy:
    """The pieces of a class and where its added parts sit.

    Attributes:
        pieces: in drawing order.
        stands: whether it belongs on the ground.
        crown: where a hat or an antenna sits.
        neck: height and half width of a scarf; None where it has no place for one.
        face: middle of an added face; None for classes that have eyes or windows of their own.
        turns: whether it faces sideways, so that its mirror image is the same thing turned round.
    """

    pieces: tuple[Piece, ...]
    stands: bool
    crown: Point
    neck: tuple[float, float] | None = None
    face: Point | None = None
    turns: bool = False

    def wearable(self, part: str) -> bool:
        """Whether an object of this class can have the part."""
        return {"scarf": self.neck, "face": self.face}.get(part, self.crown) is not None


def wear(anatomy: Anatomy, part: str) -> tuple[Piece, ...]:
    """The pieces of an added part, where the anatomy has its place.

    Raises:
        ValueError: the class has no place for the part.
    """
    x, y = anatomy.crown
    if part == "hat":
        return (
            Piece(rectangle(x - 0.3, y - 0.46, x + 0.3, y), Paint.ACCENT),
            Piece(rounded(x - 0.56, y - 0.1, x + 0.56, y + 0.08, 0.08), Paint.ACCENT),
        )
    if part == "antenna":
        return (
            Piece(rectangle(x - 0.04, y - 0.4, x + 0.04, y + 0.08), Paint.METAL),
            Piece(ellipse(x, y - 0.36, 0.19), Paint.ACCENT),
        )
    if part == "scarf" and anatomy.neck is not None:
        height, half = anatomy.neck
        knot = half * 0.45
        return (
            Piece(
                ((knot, height), (knot + 0.2, height), (knot + 0.36, height + 0.48), (knot + 0.1, height + 0.52)),
                Paint.ACCENT,
            ),
            Piece(rounded(-half, height - 0.12, half, height + 0.12, 0.11), Paint.ACCENT),
        )
    if part == "face" and anatomy.face is not None:
        x, y = anatomy.face
        return (*_eye(x - 0.24, y - 0.08, 0.17), *_eye(x + 0.24, y - 0.08, 0.17), _mouth(x, y + 0.16, 0.24))
    raise ValueError(f"no place for a {part!r} on this class; ask Anatomy.wearable first")


def _eye(x: float, y: float, radius: float) -> tuple[Piece, ...]:
    return (
        Piece(ellipse(x, y, radius, corners=16), Paint.WHITE, outlined=False),
        Piece(ellipse(x, y + 0.02, radius * 0.55, corners=12), Paint.INK, outlined=False),
    )


def _mouth(x: float, y: float, width: float) -> Piece:
    return Piece(smile(x, y, width, 0.2, 0.12), Paint.INK, outlined=False)


BALL = Anatomy(
    (
        Piece(ellipse(0, 0, 0.95, corners=40), Paint.SHADE),
        Piece(ellipse(-0.07, -0.08, 0.8, corners=40), Paint.COAT, outlined=False),
        Piece(ellipse(-0.38, -0.48, 0.2, 0.14), Paint.SHINE, outlined=False),
    ),
    stands=False,
    crown=(0, -0.88),
    neck=(0.44, 0.86),
    face=(0, -0.06),
)

BOX = Anatomy(
    (
        Piece(((0.5, -0.42), (0.95, -0.85), (0.95, 0.5), (0.5, 0.95)), Paint.SHADE),
        Piece(((-0.95, -0.42), (-0.5, -0.85), (0.95, -0.85), (0.5, -0.42)), Paint.SHINE),
        Piece(rectangle(-0.95, -0.42, 0.5, 0.95), Paint.COAT),
    ),
    stands=True,
    crown=(0.1, -0.72),
    neck=(0.5, 0.98),
    face=(-0.22, 0.12),
)

STAR = Anatomy(
    (Piece(star(0, 0.1, 1.05, 0.5), Paint.COAT),),
    stands=False,
    crown=(0, -0.72),
    neck=(0.38, 0.6),
    face=(0, 0),
)

HEART = Anatomy(
    (
        Piece(heart(), Paint.COAT),
        Piece(ellipse(-0.5, -0.52, 0.2, 0.13), Paint.SHINE, outlined=False),
    ),
    stands=False,
    crown=(0, -0.66),
    neck=(0.3, 0.62),
    face=(0, -0.12),
)

TREE = Anatomy(
    (
        Piece(((-0.16, 0.2), (0.16, 0.2), (0.24, 0.97), (-0.24, 0.97)), Paint.WOOD),
        Piece(scallop(0, -0.3, 0.88, 0.74, 8, 0.2), Paint.COAT),
    ),
    stands=True,
    crown=(0, -0.92),
    neck=(0.5, 0.38),
    face=(0, -0.28),
)

HOUSE = Anatomy(
    (
        Piece(rectangle(0.4, -0.9, 0.66, -0.3), Paint.WOOD),
        Piece(rectangle(-0.78, -0.2, 0.78, 0.95), Paint.COAT),
        Piece(((0, -0.98), (0.98, -0.12), (-0.98, -0.12)), Paint.SHADE),
        Piece(rectangle(-0.52, 0.3, -0.1, 0.95), Paint.WOOD),
        Piece(rectangle(0.14, 0.16, 0.56, 0.54), Paint.GLASS),
    ),
    stands=True,
    crown=(0, -0.86),
)

FISH = Anatomy(
    (
        Piece(((0.45, 0), (0.98, -0.5), (0.86, 0), (0.98, 0.5)), Paint.SHADE),
        Piece(((-0.05, -0.4), (0.3, -0.85), (0.45, -0.3)), Paint.SHADE),
        Piece(((-0.1, 0.45), (0.1, 0.8), (0.3, 0.42)), Paint.SHADE),
        Piece(ellipse(-0.18, 0, 0.8, 0.56, corners=36), Paint.COAT),
        *_eye(-0.58, -0.12, 0.2),
        Piece(smile(-0.72, 0.14, 0.2, 0.18, 0.12), Paint.INK, outlined=False),
    ),
    stands=False,
    crown=(-0.34, -0.5),
    turns=True,
)

ROBOT = Anatomy(
    (
        Piece(rectangle(-0.42, 0.65, -0.14, 0.96), Paint.METAL),
        Piece(rectangle(0.14, 0.65, 0.42, 0.96), Paint.METAL),
        Piece(rounded(-0.86, -0.02, -0.5, 0.5, 0.14), Paint.METAL),
        Piece(rounded(0.5, -0.02, 0.86, 0.5, 0.14), Paint.METAL),
        Piece(rounded(-0.58, -0.14, 0.58, 0.76, 0.12), Paint.COAT),
        Piece(rounded(-0.66, -0.96, 0.66, -0.16, 0.2), Paint.COAT),
        Piece(rounded(-0.48, -0.83, 0.48, -0.43, 0.14), Paint.METAL, outlined=False),
        *_eye(-0.23, -0.63, 0.17),
        *_eye(0.23, -0.63, 0.17),
        Piece(smile(0, -0.36, 0.22, 0.12, 0.1), Paint.INK, outlined=False),
    ),
    stands=True,
    crown=(0, -0.95),
    neck=(-0.14, 0.52),
)

ANATOMIES: dict[str, Anatomy] = {
    "ball": BALL,
    "box": BOX,
    "star": STAR,
    "heart": HEART,
    "tree": TREE,
    "house": HOUSE,
    "fish": FISH,
    "robot": ROBOT,
}
KINDS = tuple(ANATOMIES)
"""The eight class words."""
