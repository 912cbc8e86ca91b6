from __future__ import annotations

import re

import pytest

from ether_diffusion.playground.world import (
    COLOURS,
    KINDS,
    PARTS,
    Look,
    Scene,
    SceneObject,
    full_captions,
    random_caption,
    random_scene,
    short_captions,
)

SIGNS = {
    "meadow": ("meadow",),
    "beach": ("beach",),
    "night": ("night",),
    "clouds": ("cloudy", "clouds"),
    "snow": ("snow", "snowy"),
    "bricks": ("brick",),
}
PATTERN_SIGNS = {
    "plain": (),
    "striped": ("striped", "stripes"),
    "dotted": ("dotted", "dots"),
    "two-tone": ("two-tone", "half"),
}


def words(caption: str) -> list[str]:
    return caption.replace(",", "").split()


def mentioned(caption: str, signs: dict[str, tuple[str, ...]]) -> set[str]:
    return {name for name, known in signs.items() if set(known) & set(words(caption))}


def test_full_captions_name_exactly_what_is_drawn() -> None:
    for index in range(1500):
        scene = random_scene(21, index)
        looks = [item.look for item in scene.objects]
        colours = [name for look in looks for name in (look.colour, look.second, look.accent) if name]
        colours += [scene.tint] if scene.tint else []
        parts = [part for look in looks for part in look.parts]
        for caption in full_captions(scene):
            assert sorted(set(words(caption)) & set(KINDS)) == sorted(item.kind for item in scene.objects)
            assert sorted(word for word in words(caption) if word in COLOURS) == sorted(colours)
            assert sorted(word for word in words(caption) if word in PARTS) == sorted(parts)
            assert mentioned(caption, SIGNS) == {scene.background}
            assert mentioned(caption, PATTERN_SIGNS) == {look.pattern for look in looks} - {"plain"}


def test_short_captions_leave_out_but_never_add() -> None:
    for index in range(1500):
        scene = random_scene(22, index)
        coats = {name for item in scene.objects for name in item.look.coat}
        shorts = short_captions(scene)
        for caption in shorts:
            assert set(words(caption)) & set(KINDS) in (set(), {item.kind for item in scene.objects})
            assert set(words(caption)) & set(COLOURS) <= coats | {scene.tint}
            assert mentioned(caption, SIGNS) <= {scene.background}
        assert any(not mentioned(caption, SIGNS) for caption in shorts) == bool(scene.objects)
        assert any(not set(words(caption)) & set(KINDS) for caption in shorts)


def test_articles_fit() -> None:
    for index in range(1500):
        scene = random_scene(23, index)
        for caption in (*full_captions(scene), *short_captions(scene)):
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |\b(a|an) (a|an)\b", caption), caption


def robot(look: Look, size: float = 16) -> tuple[SceneObject, ...]:
    return (SceneObject("robot", look, (32, 40), size),)


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (Scene("beach", robot(Look("red"))), "a photo of a red robot, on a beach"),
        (Scene("snow", robot(Look("red", "striped", "blue"))), "a red and blue striped robot in the snow"),
        (Scene("night", robot(Look("red"), 10)), "a small red robot at night"),
        (Scene("night", robot(Look("red"), 22)), "a picture of a big red robot under a night sky"),
        (
            Scene("clouds", robot(Look("orange", "dotted", "white", 0, ("hat", "scarf"), "blue")), "pink"),
            "an orange robot with white dots and a blue hat and scarf in a pink cloudy sky",
        ),
        (
            Scene("meadow", (*robot(Look("red")), SceneObject("star", Look("blue", parts=("face",)), (48, 20), 13))),
            "a red robot next to a blue star with a face on a meadow",
        ),
        (Scene("beach", (), "orange"), "a beach under an orange sky"),
        (Scene("bricks"), "a brick wall"),
    ],
)
def test_captions_read_like_english(scene: Scene, expected: str) -> None:
    assert expected in full_captions(scene)


def test_an_object_of_middle_size_is_neither_small_nor_big() -> None:
    assert not [c for c in full_captions(Scene("snow", robot(Look("red"), 16))) if {"small", "big"} & set(words(c))]


def test_class_only_and_background_only_captions_exist() -> None:
    shorts = short_captions(Scene("beach", robot(Look("red"))))
    assert {"a robot", "a beach", "a red robot", "a robot on a beach"} <= set(shorts)


def test_a_random_caption_is_a_function_of_its_arguments_and_one_in_five_is_short() -> None:
    scene = Scene("beach", robot(Look("red")))
    captions = [random_caption(scene, 0, index) for index in range(2000)]
    assert captions == [random_caption(scene, 0, index) for index in range(2000)]
    assert captions != [random_caption(scene, 1, index) for index in range(2000)]
    assert set(captions) == {*full_captions(scene), *short_captions(scene)}
    shorts = sum(caption in short_captions(scene) for caption in captions)
    assert shorts / 2000 == pytest.approx(0.2, abs=0.04)
