"""A supersampled canvas that keeps picture, semantic map and contours of one geometry."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ether_diffusion.playground.world.palette import INK, RGB, mix
from ether_diffusion.playground.world.regions import Region
from ether_diffusion.playground.world.shapes import Point, Polygon

SIDE = 64
"""Width and height of every picture in pixels."""
SUPERSAMPLING = 4
_FULL = 240
"""A covered pixel in the sums of its samples: divisible by SUPERSAMPLING², so that no share is rounded."""

Map = npt.NDArray[np.uint8]


class Canvas:
    """Three layers, each ``SUPERSAMPLING`` times finer than the picture; coordinates are pixels of the picture."""

    def __init__(self) -> None:
        size = (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING)
        self._picture = Image.new("RGB", size)
        self._regions = Image.new("L", size)
        self._contours = Image.new("L", size)
        self._picture_pen = ImageDraw.Draw(self._picture)
        self._regions_pen = ImageDraw.Draw(self._regions)
        self._contours_pen = ImageDraw.Draw(self._contours)

    def gradient(self, top: RGB, bottom: RGB, region: Region) -> None:
        """Fill the whole canvas with a colour that goes from ``top`` to ``bottom``."""
        column = Image.new("RGB", (1, SIDE))
        column.putdata([mix(top, bottom, y / (SIDE - 1)) for y in range(SIDE)])
        self._picture.paste(column.resize(self._picture.size))
        self._regions.paste(int(region), (0, 0, *self._regions.size))

    def fill(self, polygon: Polygon, colour: RGB, region: Region | None = None) -> None:
        """Fill a polygon; without a ``region`` it decorates what is below and the semantic map stays."""
        points = _fine(polygon)
        self._picture_pen.polygon(points, fill=colour)
        if region is not None:
            self._claim(points, region)

    def cover(self, polygon: Polygon, texture: Image.Image, region: Region) -> None:
        """Fill a polygon with what :meth:`texture` made."""
        points = _fine(polygon)
        mask = Image.new("L", self._picture.size)
        ImageDraw.Draw(mask).polygon(points, fill=255)
        self._picture.paste(texture, mask=mask)
        self._claim(points, region)

    def texture(self, colour: RGB, marks: tuple[Polygon, ...], second: RGB) -> Image.Image:
        """A sheet of ``colour`` with ``marks`` in the ``second`` colour, to be cut out by :meth:`cover`."""
        sheet = Image.new("RGB", self._picture.size, colour)
        pen = ImageDraw.Draw(sheet)
        for mark in marks:
            pen.polygon(_fine(mark), fill=second)
        return sheet

    def outline(self, polygon: Polygon, width: float, region: Region) -> None:
        """Draw a polygon's rim in ink, ``width`` pixels wide; it belongs to ``region`` and to the contours."""
        points = _fine(polygon)
        points += points[:2]
        thickness = round(width * SUPERSAMPLING)
        self._picture_pen.line(points, fill=INK, width=thickness, joint="curve")
        self._regions_pen.line(points, fill=int(region), width=thickness, joint="curve")
        self._contours_pen.line(points, fill=_FULL, width=thickness, joint="curve")

    def _claim(self, points: list[Point], region: Region) -> None:
        """Give a filled polygon to ``region`` and hide the contours below it."""
        self._regions_pen.polygon(points, fill=int(region))
        self._contours_pen.polygon(points, fill=0)

    def picture(self) -> Image.Image:
        """The picture, RGB of ``SIDE`` x ``SIDE``."""
        return self._picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)

    def semantic_map(self) -> Map:
        """The :class:`Region` that covers most of every pixel, (SIDE, SIDE) uint8."""
        present = [value for value, count in enumerate(self._regions.histogram()) if count]
        planes = [self._regions.point([_FULL * (value == region) for value in range(256)]) for region in present]
        shares = np.stack([np.asarray(plane.reduce(SUPERSAMPLING)) for plane in planes])
        return np.array(present, dtype=np.uint8)[shares.argmax(0)]

    def edges(self, semantic_map: Map) -> Map:
        """255 where two background regions meet and on the objects' contours, else 0, (SIDE, SIDE) uint8."""
        edges = np.asarray(self._contours.reduce(SUPERSAMPLING)) >= _FULL // 2
        for axis in (0, 1):
            regions, marked = np.moveaxis(semantic_map, axis, 0), np.moveaxis(edges, axis, 0)
            here, there = regions[:-1], regions[1:]
            marked[:-1] |= (here != there) & (np.maximum(here, there) < Region.BALL)  # objects bring their contours
        return edges.astype(np.uint8) * np.uint8(255)


def _fine(polygon: Polygon) -> list[Point]:
    """Pixels of the picture to samples; Pillow counts from the middle of the first sample."""
    return [(x * SUPERSAMPLING - 0.5, y * SUPERSAMPLING - 0.5) for x, y in polygon]
