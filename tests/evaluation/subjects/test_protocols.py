"""Protocols: the right photos, classes and prompts for the right subjects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.evaluation.subjects.protocols import Subject, load_protocol
from ether_diffusion.playground.world import SUBJECTS, draw, subject, true_scene

LISTING = """Classes

subject_name,class
dog,dog
dog2,dog
old_boot,rubber boot

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on a table'.format(unique_token, class_token),
'a blue {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} asleep'.format(unique_token, class_token)
]
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The layout of the DreamBooth benchmark, with three subjects of our own."""
    for name in ("dog", "dog2", "old_boot"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "00.jpg")
    (tmp_path / "prompts_and_classes.txt").write_text(LISTING)
    return tmp_path


def test_the_playground_draws_all_its_subjects(tmp_path: Path) -> None:
    subjects = load_protocol("playground", None, tmp_path)
    assert [each.name for each in subjects] == list(SUBJECTS)
    assert all(len(each.prompts) == 11 or len(each.prompts) == 10 for each in subjects)
    assert all(len(list(each.references.glob("*.png"))) == 5 for each in subjects)


def test_the_playground_draws_the_truth_of_every_prompt(tmp_path: Path) -> None:
    (box,) = load_protocol("playground", None, tmp_path / "subjects", ["gift-box"])
    assert not (tmp_path / "subjects" / "beach-ball").exists()  # only what is asked for is drawn
    assert len(box.truths) == len(box.answers) == len(box.prompts) == 10
    individual = subject("gift-box")
    for request, truths, answers in zip(individual.requests, box.truths, box.answers, strict=True):
        assert (len(truths), len(answers)) == (8, 4)
        for index, path in enumerate((*truths, *answers)):
            drawn = draw(true_scene(individual, request, 0, index)).image
            np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(drawn))
    pictures = [path.read_bytes() for paths in (*box.truths, *box.answers) for path in paths]
    assert len(set(pictures)) == 120  # an answer is never one of the pictures that it is compared with
    again = load_protocol("playground", None, tmp_path / "subjects", ["gift-box"])[0]
    assert again.truths_fingerprint == box.truths_fingerprint
    Image.new("RGB", (64, 64)).save(box.truths[3][2])
    changed = load_protocol("playground", None, tmp_path / "subjects", ["gift-box"])[0]
    assert changed.truths_fingerprint != box.truths_fingerprint
    assert changed.fingerprint == box.fingerprint


def test_the_benchmarks_listing_is_read(data: Path, tmp_path: Path) -> None:
    dog, second, boot = load_protocol("dreambooth", data, tmp_path)
    assert (dog.truths, dog.truths_fingerprint) == ((), None)  # nobody knows it for photos
    assert (dog.name, dog.class_word, dog.prompts) == ("dog", "dog", ("a {token} dog asleep",))
    assert second.references == data / "dog2"
    assert boot.prompts == ("a {token} rubber boot on a table", "a blue {token} rubber boot")


def test_only_the_named_subjects_are_taken_by_their_whole_name(data: Path, tmp_path: Path) -> None:
    assert [each.name for each in load_protocol("dreambooth", data, tmp_path, ["dog"])] == ["dog"]
    with pytest.raises(ValueError, match=r"no subject 'old_boots'.*old_boot"):
        load_protocol("dreambooth", data, tmp_path, ["old_boots"])


def test_photos_that_are_missing_are_named(data: Path, tmp_path: Path) -> None:
    (data / "dog2" / "00.jpg").unlink()
    (data / "dog2").rmdir()
    with pytest.raises(FileNotFoundError, match="dog2"):
        load_protocol("dreambooth", data, tmp_path)
    with pytest.raises(ValueError, match="needs data_dir"):
        load_protocol("dreambooth", None, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"prompts_and_classes\.txt"):
        load_protocol("dreambooth", data / "dog", tmp_path)


def test_unrelated_prompts_do_not_name_the_class(data: Path, tmp_path: Path) -> None:
    for each in load_protocol("playground", None, tmp_path / "drawn"):
        assert len(each.unrelated) == 7
        assert not any(each.class_word in prompt.split() for prompt in each.unrelated)
    dog = load_protocol("dreambooth", data, tmp_path)[0]
    assert len(set(dog.unrelated)) == 10
    classes = "backpack animal bowl can candle cat clock sneaker dog toy boot cartoon sunglasses teapot vase glasses"
    assert not any(word in prompt.split() for word in classes.split() for prompt in dog.unrelated)


def test_a_replaced_photo_is_noticed(data: Path, tmp_path: Path) -> None:
    before = load_protocol("dreambooth", data, tmp_path)[0].fingerprint
    assert load_protocol("dreambooth", data, tmp_path)[0].fingerprint == before
    Image.new("RGB", (8, 8), "red").save(data / "dog" / "00.jpg")
    assert load_protocol("dreambooth", data, tmp_path)[0].fingerprint != before


def test_a_file_of_ones_own(data: Path, tmp_path: Path) -> None:
    mine = data / "mine.yaml"
    mine.write_text('- {name: rex, class: dog, references: dog, prompts: ["a {token} dog"]}')
    assert load_protocol(str(mine), None, tmp_path) == [Subject("rex", "dog", data / "dog", ("a {token} dog",))]
    mine.write_text('- {name: rex, class: dog, references: dog, prompts: ["a {token} dog"], unrelated: [a boat]}')
    assert load_protocol(str(mine), None, tmp_path)[0].unrelated == ("a boat",)
    mine.write_text('- {name: rex, class: dog, references: dog, prompts: ["a dog"]}')
    with pytest.raises(ValueError, match=r"rex: prompts without \{token\}: a dog"):
        load_protocol(str(mine), None, tmp_path)
    for field, value, message in (
        ("unrelated", '"a boat"', "unrelated of rex is to be a list"),
        ("prompts", "[a {token} {dog}]", r"\{token\} is all that braces may hold"),
        ("name", "../rex", "the name is to be a folder's"),
    ):
        entry = {"name": "rex", "class": "dog", "references": "dog", "prompts": '["a {token} dog"]', field: value}
        mine.write_text(
            "- "
            + "\n  ".join(f"{key}: {text}" for key, text in entry.items()).replace(
                "[a {token} {dog}]", '["a {token} {dog}"]'
            )
        )
        with pytest.raises(ValueError, match=message):
            load_protocol(str(mine), None, tmp_path)
    mine.write_text("- {name: rex}")
    with pytest.raises(ValueError, match="class, name, prompts, references"):
        load_protocol(str(mine), None, tmp_path)
    entry = '- {name: rex, class: dog, references: dog, prompts: ["a {token} dog"]}\n'
    mine.write_text(2 * entry)
    with pytest.raises(ValueError, match="several subjects are called rex"):
        load_protocol(str(mine), None, tmp_path)
    with pytest.raises(FileNotFoundError, match="playgroud is no file"):
        load_protocol("playgroud", None, tmp_path)
