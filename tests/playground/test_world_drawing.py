from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from ether_diffusion.playground.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PALETTE,
    PATTERNS,
    Look,
    Region,
    Scene,
    SceneObject,
    draw,
    random_scene,
)
from ether_diffusion.playground.world.backgrounds import TINTS

REACH = 4  # LANCZOS mixes pixels up to three away; a pixel that an object touches may still be labelled background
REGIONS = {
    "meadow": {Region.SKY, Region.GRASS},
    "beach": {Region.SKY, Region.SEA, Region.SAND},
    "night": {Region.NIGHT_SKY, Region.HILL},
    "clouds": {Region.SKY, Region.CLOUD},
    "snow": {Region.SKY, Region.SNOW},
    "bricks": {Region.BRICK},
}


def pixels(scene: Scene) -> npt.NDArray[np.int64]:
    return np.asarray(draw(scene).image).astype(np.int64)


def grown(mask: npt.NDArray[np.bool_], by: int) -> npt.NDArray[np.bool_]:
    padded = np.pad(mask, by)
    side = mask.shape[0]
    steps = range(2 * by + 1)
    return np.any([padded[y : y + side, x : x + side] for y in steps for x in steps], axis=0)


def overlap(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    return float((first & second).sum() / (first | second).sum())


def nearest_colour(rgb: npt.NDArray[np.float64]) -> str:
    return min(COLOURS, key=lambda name: float(np.square(rgb - PALETTE[name]).sum()))


def furthest_colour(colour: str, among: list[str]) -> str:
    return max(among, key=lambda name: float(np.square(np.subtract(PALETTE[name], PALETTE[colour])).sum()))


def scenes_with_one_object(count: int) -> list[Scene]:
    found = (random_scene(11, index) for index in range(4 * count))
    return [scene for scene in found if len(scene.objects) == 1][:count]


def test_a_drawing_is_a_picture_with_two_maps_of_its_size() -> None:
    drawing = draw(random_scene(0, 0))
    assert (drawing.image.mode, drawing.image.size) == ("RGB", (64, 64))
    for array in (drawing.semantic_map, drawing.edges):
        assert array.shape == (64, 64)
        assert array.dtype == np.uint8


def test_equal_scenes_are_drawn_equal_and_another_variation_differs() -> None:
    for background in BACKGROUNDS:
        scene = Scene(background, (SceneObject("robot", Look("red"), (32, 40), 18),), variation=5)
        np.testing.assert_array_equal(pixels(scene), pixels(replace(scene)))
        assert (pixels(scene) != pixels(replace(scene, variation=6))).any()


def test_the_exact_shade_varies_a_little_around_the_palette() -> None:
    box = (SceneObject("box", Look("blue"), (32, 38), 20),)
    shades = {tuple(pixels(Scene("bricks", box, variation=v))[44, 27].tolist()) for v in range(40)}  # its front
    assert len(shades) > 30
    assert np.abs(np.array([*shades]) - PALETTE["blue"]).max() <= 8


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_scene_has_exactly_the_regions_of_its_background(background: str) -> None:
    for variation in range(20):
        assert set(np.unique(draw(Scene(background, variation=variation)).semantic_map)) == REGIONS[background]


def fits_best_in_place(mask: npt.NDArray[np.bool_], seen: npt.NDArray[np.bool_]) -> bool:
    """Whether no shift by one pixel brings the mask nearer to what is seen."""
    shifted = [np.roll(mask, step, axis) for step in (-1, 1) for axis in (0, 1)]
    return overlap(mask, seen) > max(overlap(other, seen) for other in shifted)


def test_the_map_finds_the_pixels_that_an_object_changes() -> None:
    overlaps = []
    for scene in scenes_with_one_object(100):
        difference = np.abs(pixels(scene) - pixels(replace(scene, objects=()))).max(-1)
        drawing, empty = draw(scene), draw(replace(scene, objects=()))
        mask = drawing.semantic_map == Region[scene.objects[0].kind.upper()]
        assert not difference[~grown(mask, REACH)].any()
        apart = ~grown(mask, 1)
        np.testing.assert_array_equal(drawing.semantic_map[apart], empty.semantic_map[apart])
        if scene.background != "night":  # there the dark rim is hardly darker than the sky
            assert fits_best_in_place(mask, difference > 36), scene
            overlaps.append(overlap(mask, difference > 36))
    assert np.mean(overlaps) > 0.9


def test_the_map_of_the_clouds_is_where_the_picture_is_white() -> None:
    for variation in range(20):
        drawing = draw(Scene("clouds", variation=variation))
        white = np.asarray(drawing.image)[..., 0] > 197  # red: sky at most 180, clouds at least 214
        clouds = drawing.semantic_map == Region.CLOUD
        assert overlap(clouds, white) > 0.93
        assert fits_best_in_place(clouds, white)


def test_the_map_of_the_grass_is_where_the_picture_is_more_green_than_blue() -> None:
    for variation in range(20):
        drawing = draw(Scene("meadow", variation=variation))
        image = np.asarray(drawing.image)[20:]  # below the sun
        assert overlap(image[..., 1] > image[..., 2], drawing.semantic_map[20:] == Region.GRASS) > 0.95


def test_edges_lie_on_the_borders_of_every_object_and_region() -> None:
    for index in range(60):
        drawing = draw(random_scene(12, index))
        assert set(np.unique(drawing.edges)) <= {0, 255}
        regions, edges = drawing.semantic_map.astype(int), drawing.edges > 0
        borders = np.zeros((64, 64), dtype=bool)
        borders[:-1] |= regions[:-1] != regions[1:]
        borders[:, :-1] |= regions[:, :-1] != regions[:, 1:]
        assert (borders & ~grown(edges, 1)).sum() <= 0.02 * borders.sum()
        inside_objects = regions >= Region.BALL
        assert not (edges & ~grown(borders, 1) & ~inside_objects).any()


def test_a_wall_without_objects_has_no_edges() -> None:
    assert not draw(Scene("bricks")).edges.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_coat_has_the_named_colour(kind: str) -> None:
    for variation, colour in enumerate(COLOURS):
        other, background = furthest_colour(colour, list(COLOURS)), BACKGROUNDS[variation % len(BACKGROUNDS)]
        scene = Scene(background, (SceneObject(kind, Look(colour), (32, 38), 20),), variation=variation)
        repainted = replace(scene, objects=(replace(scene.objects[0], look=Look(other)),))
        change = np.abs(pixels(scene) - pixels(repainted)).sum(-1)
        assert nearest_colour(pixels(scene)[change > change.max() / 2].mean(0)) == colour, colour


@pytest.mark.parametrize("kind", KINDS)
def test_the_pattern_has_the_second_colour(kind: str) -> None:
    """Every class with every pattern, and every pattern in every second colour."""
    for number, pattern in enumerate(PATTERNS[1:]):
        second = list(COLOURS)[(list(KINDS).index(kind) + number) % len(COLOURS)]
        colour = "green" if second != "green" else "white"
        other = furthest_colour(second, [name for name in COLOURS if name not in (colour, second)])
        scene = Scene("meadow", (SceneObject(kind, Look(colour, pattern, second), (32, 38), 20),))
        repainted = replace(scene, objects=(replace(scene.objects[0], look=Look(colour, pattern, other)),))
        change = np.abs(pixels(scene) - pixels(repainted)).sum(-1)
        marked = change > change.max() / 2
        assert marked.sum() > 30, (pattern, second)
        assert nearest_colour(pixels(scene)[marked].mean(0)) == second, (pattern, second)


def test_a_garment_has_the_accent_colour_and_belongs_to_the_object() -> None:
    bare = Scene("meadow", (SceneObject("ball", Look("blue"), (32, 40), 18),))
    dressed = replace(bare, objects=(replace(bare.objects[0], look=Look("blue", parts=("hat",), accent="red")),))
    added = (draw(dressed).semantic_map == Region.BALL) & (draw(bare).semantic_map != Region.BALL)
    assert added.sum() > 60
    assert nearest_colour(np.median(pixels(dressed)[added & (pixels(dressed).max(-1) > 120)], axis=0)) == "red"


@pytest.mark.parametrize("background", [name for name in BACKGROUNDS if TINTS[name]])
def test_a_tint_colours_the_sky_or_the_wall(background: str) -> None:
    for tint in TINTS[background]:
        own, tinted = Scene(background), Scene(background, tint=tint)
        region = Region.BRICK if background == "bricks" else Region.SKY
        area = draw(own).semantic_map == region
        distance = [float(np.linalg.norm(pixels(s)[area].mean(0) - PALETTE[tint])) for s in (own, tinted)]
        assert distance[1] < distance[0]


def test_objects_are_mirrored_and_moved() -> None:
    fish = SceneObject("fish", Look("red"), (32, 32), 20)
    left, right = (draw(Scene("bricks", (replace(fish, flip=flip),))).semantic_map for flip in (False, True))
    assert overlap(left[:, ::-1] == Region.FISH, right == Region.FISH) > 0.97
    assert overlap(left == Region.FISH, right == Region.FISH) < 0.9
    moved = draw(Scene("bricks", (replace(fish, centre=(36, 30)),))).semantic_map
    np.testing.assert_array_equal(np.roll(left, (-2, 4), (0, 1)), moved)


@pytest.mark.parametrize(
    ("scene", "remedy"),
    [
        (Scene("moon"), "there are meadow"),
        (Scene("night", tint="pink"), "its own colours"),
        (Scene("bricks", tint="red"), "only in"),
    ],
)
def test_an_impossible_background_is_named(scene: Scene, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        draw(scene)


def test_an_impossible_object_is_named() -> None:
    with pytest.raises(ValueError, match="no such class: 'dragon'"):
        SceneObject("dragon", Look("red"), (32, 32), 20)
    with pytest.raises(ValueError, match="a house has no place for"):
        SceneObject("house", Look("red", parts=("face",)), (32, 32), 20)


@pytest.mark.parametrize(
    "attributes",
    [
        {"colour": "mauve"},
        {"colour": "red", "pattern": "striped"},
        {"colour": "red", "second": "blue"},
        {"colour": "red", "pattern": "striped", "second": "red"},
        {"colour": "red", "pattern": "checked", "second": "blue"},
        {"colour": "red", "parts": ("hat",)},
        {"colour": "red", "accent": "blue"},
        {"colour": "red", "parts": ("hat", "antenna"), "accent": "blue"},
        {"colour": "red", "parts": ("wings",)},
    ],
)
def test_a_look_that_contradicts_itself_is_refused(attributes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Look(**attributes)  # type: ignore[arg-type]
