"""Closed polygons: every form in the world is one, so that one painter can fill, outline and label it exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

Point = tuple[float, float]
Polygon = tuple[Point, ...]


def ellipse(x: float, y: float, rx: float, ry: float | None = None, corners: int = 28) -> Polygon:
    """An ellipse round ``(x, y)`` with half axes ``rx`` and ``ry`` (a circle without ``ry``)."""
    ry = rx if ry is None else ry
    return tuple((x + rx * cos, y + ry * sin) for cos, sin in _unit_circle(corners))


@lru_cache
def _unit_circle(corners: int) -> Polygon:
    return tuple((math.cos(math.tau * k / corners), math.sin(math.tau * k / corners)) for k in range(corners))


def rectangle(left: float, top: float, right: float, bottom: float) -> Polygon:
    """An upright rectangle; y points down, as in pictures."""
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def rounded(left: float, top: float, right: float, bottom: float, radius: float, corners: int = 5) -> Polygon:
    """An upright rectangle with round corners."""
    centres = (
        (right - radius, bottom - radius),
        (left + radius, bottom - radius),
        (left + radius, top + radius),
        (right - radius, top + radius),
    )
    angles = [math.pi / 2 * k / (corners - 1) for k in range(corners)]
    return tuple(
        (x + radius * math.cos(quarter * math.pi / 2 + a), y + radius * math.sin(quarter * math.pi / 2 + a))
        for quarter, (x, y) in enumerate(centres)
        for a in angles
    )


def star(x: float, y: float, outer: float, inner: float, rays: int = 5) -> Polygon:
    """A star with one ray straight up."""
    radii = (outer, inner) * rays
    angles = (math.pi * (k / rays - 0.5) for k in range(2 * rays))
    return tuple((x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True))


def heart(corners: int = 14) -> Polygon:
    """A heart in about [-1, 1]²: two circular lobes and the tangents from them to the tip below."""
    x, y, radius, tip = 0.465, -0.38, 0.525, 0.93
    reach = math.hypot(x, tip - y)
    start = -math.pi + math.acos(x / radius)  # where the lobes meet
    end = math.atan2(tip - y, -x) - math.acos(radius / reach)  # where the tangent leaves
    angles = (start + (end - start) * k / (corners - 1) for k in range(corners))
    right = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    left = [(-px, py) for px, py in reversed(right[1:])]
    return (*right, (0.0, tip), *left)


def scallop(x: float, y: float, rx: float, ry: float, bumps: int, depth: float, corners: int = 48) -> Polygon:
    """An ellipse whose rim is ``bumps`` round bulges, ``depth`` of the radius deep: foliage."""
    angles = [math.tau * k / corners for k in range(corners)]
    rims = [1 - depth + depth * abs(math.sin(bumps * a / 2 + math.pi / 4)) for a in angles]
    return tuple((x + rx * r * math.cos(a), y + ry * r * math.sin(a)) for r, a in zip(rims, angles, strict=True))


def smile(x: float, y: float, width: float, depth: float, thickness: float, corners: int = 7) -> Polygon:
    """A crescent that opens upwards, its corners at height ``y``."""
    steps = [2 * k / (corners - 1) - 1 for k in range(corners)]
    lower = [(x + width * s, y + depth * (1 - s * s)) for s in steps]
    upper = [(x + width * s, y + (depth - thickness) * (1 - s * s)) for s in reversed(steps[1:-1])]
    return (*lower, *upper)


def place(polygon: Iterable[Point], centre: Point, size: float, tilt: float = 0.0, flip: bool = False) -> Polygon:
    """Mirror (``flip``), turn by ``tilt`` degrees clockwise, scale by ``size`` and move to ``centre``."""
    cos, sin = math.cos(math.radians(tilt)) * size, math.sin(math.radians(tilt)) * size
    side = -1.0 if flip else 1.0
    x0, y0 = centre
    return tuple((x0 + side * x * cos - y * sin, y0 + side * x * sin + y * cos) for x, y in polygon)
