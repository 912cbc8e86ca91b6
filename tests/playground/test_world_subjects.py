from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.playground.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SUBJECTS,
    draw,
    subject,
    true_scene,
    where_phrases,
    write_subject,
)
from ether_diffusion.playground.world.captions import object_phrases

SIGNS = {"meadow": "meadow", "beach": "beach", "night": "night", "clouds": "cloud", "snow": "snow", "bricks": "brick"}


def test_there_are_ten_or_more_subjects_of_all_classes_and_none_looks_like_another() -> None:
    assert len(SUBJECTS) >= 10
    individuals = [subject(name) for name in SUBJECTS]
    assert {individual.class_word for individual in individuals} == set(KINDS)
    assert len({(individual.class_word, individual.look.coat) for individual in individuals}) == len(SUBJECTS)


@pytest.mark.parametrize("name", SUBJECTS)
def test_references_share_the_individual_and_differ_in_scene(name: str) -> None:
    individual = subject(name)
    assert len(individual.references) == 5
    for reference in individual.references:
        (item,) = reference.objects
        assert (item.kind, item.look) == (individual.class_word, individual.look)
    assert len({reference.background for reference in individual.references}) == 3
    assert len({reference.variation for reference in individual.references}) == 5
    for attribute in ("centre", "size"):
        assert len({getattr(reference.objects[0], attribute) for reference in individual.references}) == 5
    pictures = [np.asarray(draw(reference).image).astype(int) for reference in individual.references]
    assert min(np.abs(a - b).mean() for k, a in enumerate(pictures) for b in pictures[:k]) > 5


@pytest.mark.parametrize("name", SUBJECTS)
def test_prompts_ask_for_the_individual_in_scenes_that_no_reference_shows(name: str) -> None:
    individual = subject(name)
    kind = individual.class_word
    assert len(set(individual.prompts)) == 10
    assert all(prompt.count(f"{{token}} {kind}") == 1 for prompt in individual.prompts)
    filled = [prompt.format(token="sks") for prompt in individual.prompts]
    seen = {reference.background for reference in individual.references}
    new = set(BACKGROUNDS) - seen
    for background in new:
        assert f"a sks {kind} {where_phrases(background)[0]}" in filled
    others = [set(prompt.split()) & set(KINDS) - {kind} for prompt in filled]
    assert sum(map(bool, others)) == 2
    own = {*individual.look.coat, individual.look.accent}
    for prompt, other in zip(filled, others, strict=True):
        plain = not ({"small", "big"} | set(COLOURS)) & set(prompt.split())
        assert not (plain and not other and any(SIGNS[background] in prompt for background in seen)), prompt
        if other:
            assert not set(prompt.split()) & own, "the second object has a colour of its own"
    assert any("small" in prompt for prompt in filled)
    assert any("big" in prompt for prompt in filled)
    alone = [prompt for prompt, other in zip(filled, others, strict=True) if not other]
    assert sum(bool(set(prompt.split()) & set(COLOURS)) for prompt in alone) == 2


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_true_scene_is_what_the_prompt_says_in_the_words_of_the_world(name: str) -> None:
    individual = subject(name)
    for request in individual.requests:
        before, after = request.prompt.split(f"{{token}} {individual.class_word}")
        for index in range(6):
            scene = true_scene(individual, request, 3, index)
            me, *others = scene.objects
            assert (me.kind, me.look) == (individual.class_word, individual.look)
            places = where_phrases(scene.background, scene.tint)
            assert any(after.endswith(place) for place in places)
            size = before.split()[-1]  # "a", "small" or "big", as captions call such an object
            assert size == "a" or any(phrase.startswith(f"a {size} ") for phrase in object_phrases(me))
            company = after.removesuffix(next(place for place in places if after.endswith(place))).split()
            assert bool(company) == bool(others)
            if others:
                (other,) = others
                named = " ".join(company).removeprefix("and ").removeprefix("next to ")
                assert named in object_phrases(other)
                assert me.centre[0] < other.centre[0]  # captions name the left object first


def test_true_scenes_vary_in_what_the_prompt_leaves_open_and_no_two_series_share_one() -> None:
    individual = subject("gift-box")
    request = individual.requests[0]
    scenes = {true_scene(individual, request, seed, index) for seed in (0, 1) for index in range(20)}
    assert len(scenes) == 40
    assert true_scene(individual, request, 0, 5) in scenes  # a pure function of its arguments
    sizes = [scene.objects[0].size for scene in scenes]
    assert max(sizes) - min(sizes) > 8
    small, big = (next(r for r in individual.requests if f" {word} " in r.prompt) for word in ("small", "big"))
    assert max(true_scene(individual, small, 0, index).objects[0].size for index in range(20)) < 12.5
    assert min(true_scene(individual, big, 0, index).objects[0].size for index in range(20)) > 19.5


def test_a_written_subject_is_its_five_references(tmp_path: Path) -> None:
    folder = write_subject("striped-robot", tmp_path / "subject")
    assert sorted(path.name for path in folder.iterdir()) == [f"{index:02d}.png" for index in range(5)]
    for index, reference in enumerate(subject("striped-robot").references):
        with Image.open(folder / f"{index:02d}.png") as picture:
            assert (picture.mode, picture.size) == ("RGB", (64, 64))
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(draw(reference).image))


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_subject("striped-robot", tmp_path / "subject")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    save = Image.Image.save

    def full_disk(picture: Image.Image, path: Path) -> None:
        if path.name == "02.png":
            raise OSError("no space left on device")
        save(picture, path)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_subject("beach-ball", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_an_unknown_subject_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no such subject: 'dragon'; there are striped-robot"):
        subject("dragon")
