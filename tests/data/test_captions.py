"""What pictures are called: texts and metadata, prefix, orders of tags, and which of them a sample takes."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from PIL import Image

from ether_diffusion.data.captions import Picture, Prompts, list_pictures, prompts_of, tag_orders
from ether_diffusion.data.options import FolderOptions
from ether_diffusion.data.randomness import generator

TAGS = "qwe dog, grass, sunny, side view, photo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "b.png", "deep/a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def found(folder: Path, **options: bool | str) -> dict[str, tuple[str, ...]]:
    return {each.name: each.captions for each in list_pictures(folder, FolderOptions(**options)).pictures}


def picture(*captions: str) -> Picture:
    return Picture(Path("a.png"), "a.png", captions)


def test_every_line_of_a_text_is_a_caption(folder: Path) -> None:
    (folder / "a.txt").write_text("a dog\r\n\n  one dog \na dog\n")
    (folder / "b.txt").write_text("a cat\n")
    assert found(folder) == {"a.png": ("a dog", "one dog"), "b.png": ("a cat",)}


def test_pictures_in_subfolders_are_found_when_asked_for_or_named(folder: Path) -> None:
    assert list(found(folder)) == ["a.png", "b.png"]
    (folder / "deep" / "a.txt").write_text("deep down")
    assert found(folder, nested_folders=True) == {"a.png": (), "b.png": (), "deep/a.png": ("deep down",)}
    (folder / "metadata.csv").write_text("file_name,text\ndeep/a.png,deep down\nb.png,x\n")
    named = list_pictures(folder)
    assert {each.name: each.captions for each in named.pictures} == {
        "a.png": (),
        "b.png": ("x",),
        "deep/a.png": ("deep down",),
    }
    assert named.listing == folder / "metadata.csv"


def test_metadata_and_a_text_must_agree(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\na.png,a dog\n")
    (folder / "a.txt").write_text("a dog\n")
    (folder / "b.txt").write_text("a cat\n")
    assert found(folder) == {"a.png": ("a dog",), "b.png": ("a cat",)}
    (folder / "a.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match=r"a\.png has a caption in .*metadata.csv, line 2 and another in a text"):
        found(folder)


def test_a_prefix_stands_before_captions_and_not_before_the_folders_prompt() -> None:
    options = FolderOptions(caption_prefix="a photo of qwe,")
    assert prompts_of(picture("on grass", "in snow"), "a dog", options).all == [
        "a photo of qwe, on grass",
        "a photo of qwe, in snow",
    ]
    assert prompts_of(picture(), "a dog", options).all == ["a dog"]
    assert prompts_of(picture("on grass"), "a dog").all == ["on grass"]


def test_tags_behind_the_kept_ones_are_shuffled() -> None:
    orders = tag_orders(TAGS, keep=1, number=8, seed=0)
    assert 4 < len(orders) <= 8
    assert len(set(orders)) == len(orders)
    for order in orders:
        tags = order.split(", ")
        assert tags[0] == "qwe dog"
        assert Counter(tags) == Counter(TAGS.split(", "))
    assert orders == tag_orders(TAGS, keep=1, number=8, seed=0)
    assert orders != tag_orders(TAGS, keep=1, number=8, seed=1)


def test_few_tags_have_all_their_orders() -> None:
    expected = {", ".join(("a", *order)) for order in permutations("bcd")}
    assert set(tag_orders("a,b , c,,d", keep=1, number=6, seed=0)) == expected
    assert len(tag_orders("a, b, c, d", keep=1, number=5, seed=0)) <= 5


@pytest.mark.parametrize("caption", ["a dog on  grass", "a dog,grass", "a dog,grass,grass", "a dog ,", ","])
def test_a_caption_without_tags_to_exchange_stays_as_it_is(caption: str) -> None:
    assert tag_orders(caption, keep=1, number=8, seed=0) == [caption]


def test_a_thousand_tags_have_a_few_orders() -> None:
    caption = ", ".join(map(str, range(1000)))
    assert len(tag_orders(caption, keep=0, number=3, seed=0)) == 3


def test_each_caption_is_as_likely_however_many_orders_it_has() -> None:
    prompts = prompts_of(picture("one dog", TAGS), "", FolderOptions(shuffle_tags=True, tag_orders=20))
    assert len(prompts.all) > 15
    drawn = Counter(prompts.draw(generator(0, number)) for number in range(400))
    assert drawn.keys() <= set(prompts.all)
    assert len(drawn) > 12
    # four standard deviations of 400 draws of one half
    assert abs(drawn["one dog"] - 200) < 40


def test_a_single_prompt_draws_nothing() -> None:
    random, untouched = generator(0, "x"), generator(0, "x")
    assert Prompts((("a dog",),)).draw(random) == "a dog"
    assert random.get_state().equal(untouched.get_state())
