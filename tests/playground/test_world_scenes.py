from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from ether_diffusion.playground.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PARTS,
    PATTERNS,
    SUBJECTS,
    Region,
    Scene,
    SceneObject,
    draw,
    random_caption,
    random_scene,
    subject,
)
from ether_diffusion.playground.world.individuals import INDIVIDUALS
from ether_diffusion.playground.world.objects import ANATOMIES

N = 20_000


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [random_scene(3, index) for index in range(N)]


@pytest.fixture(scope="module")
def objects(scenes: list[Scene]) -> list[SceneObject]:
    return [item for scene in scenes for item in scene.objects]


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    first = [random_scene(1, index) for index in range(50)]
    assert [random_scene(1, index) for index in reversed(range(50))] == first[::-1]
    assert len({*first, *(random_scene(2, index) for index in range(50))}) == 100


def test_neighbouring_scenes_are_drawn_differently() -> None:
    pictures = {draw(random_scene(1, index)).image.tobytes() for index in range(50)}
    assert len(pictures) == 50


def fingerprint() -> str:
    digest = hashlib.sha256()
    for index in range(30):
        scene = random_scene(4, index)
        digest.update(draw(scene).image.tobytes() + random_caption(scene, 4, index).encode())
    digest.update(repr([subject(name) for name in SUBJECTS]).encode())
    return digest.hexdigest()


def test_another_process_draws_the_same() -> None:
    head = "import hashlib\nfrom ether_diffusion.playground.world import *\n"
    program = head + inspect.getsource(fingerprint) + "print(fingerprint())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    child = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == fingerprint()


@pytest.mark.parametrize(("attribute", "values"), [("kind", KINDS), ("colour", COLOURS), ("background", BACKGROUNDS)])
def test_classes_colours_and_backgrounds_are_equally_frequent(
    scenes: list[Scene], objects: list[SceneObject], attribute: str, values: tuple[str, ...]
) -> None:
    drawn = {
        "kind": [item.kind for item in objects],
        "colour": [item.look.colour for item in objects],
        "background": [scene.background for scene in scenes],
    }[attribute]
    counts = Counter(drawn)
    assert set(counts) == set(values)
    for count in counts.values():  # 10% is more than four standard deviations
        assert count == pytest.approx(len(drawn) / len(values), rel=0.1)


def test_scenes_have_no_object_one_or_two(scenes: list[Scene]) -> None:
    counts = Counter(len(scene.objects) for scene in scenes)
    assert counts[0] / N == pytest.approx(0.05, abs=0.01)
    assert counts[2] / N == pytest.approx(0.15, abs=0.01)
    assert counts[0] + counts[1] + counts[2] == N


def test_every_pattern_and_part_occurs_with_every_class_that_can_have_it(objects: list[SceneObject]) -> None:
    assert {(item.kind, item.look.pattern) for item in objects} == {(k, p) for k in KINDS for p in PATTERNS}
    wearable = {(kind, part) for kind in KINDS for part in PARTS if ANATOMIES[kind].wearable(part)}
    assert {(item.kind, part) for item in objects for part in item.look.parts} == wearable


def test_coats_are_all_pairs_of_colours_but_those_of_the_individuals(objects: list[SceneObject]) -> None:
    seen = {(item.kind, item.look.coat) for item in objects if item.look.second}
    every_pair = {(kind, frozenset(pair)) for kind in KINDS for pair in combinations(COLOURS, 2)}
    assert every_pair - seen == {(kind, look.coat) for kind, look in INDIVIDUALS.values()}


def test_no_individual_occurs(objects: list[SceneObject]) -> None:
    assert not {(item.kind, item.look) for item in objects} & set(INDIVIDUALS.values())


def test_objects_lie_wholly_inside_the_picture_and_apart() -> None:
    for index in range(150):
        scene = random_scene(5, index)
        together = draw(scene).semantic_map
        rim = np.concatenate([together[0], together[-1], together[:, 0], together[:, -1]])
        assert (rim < Region.BALL).all(), scene
        for item in scene.objects:
            region = Region[item.kind.upper()]
            alone = draw(Scene(scene.background, (item,), scene.tint, scene.variation)).semantic_map
            assert (alone == region).sum() >= 100
            np.testing.assert_array_equal(together == region, alone == region)


def test_what_stands_has_its_feet_on_the_ground() -> None:
    for index in range(300):
        scene = random_scene(6, index)
        ground = draw(Scene(scene.background, (), scene.tint, scene.variation)).semantic_map
        if scene.background not in ("meadow", "beach", "snow"):
            continue
        for item in scene.objects:
            if item.kind in ("box", "tree", "house", "robot"):
                x, y = item.centre
                assert ground[int(y + item.size), int(x)] in (Region.GRASS, Region.SAND, Region.SNOW)
