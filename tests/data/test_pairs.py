"""Pairs of pictures and conditions: both layouts of a folder, datasets, and what is wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.control.conditions import MAP_PALETTE, colour_map, load_condition
from ether_diffusion.data.pairs import (
    Columns,
    DatasetPairs,
    FolderPairs,
    plain_listing,
    read_listing,
)
from ether_diffusion.images import UnreadableImageError


def save(path: Path, size: tuple[int, int] = (64, 48), shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 100, 200)).save(path)
    return path


def lines(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        save(tmp_path / "images" / f"{number}.png", shade=number)
        save(tmp_path / "maps" / f"{number}.png", shade=100 + number)
    row = {"file_name": "images/{0}.png", "conditioning_image": "maps/{0}.png", "text": "picture {0}"}
    lines(
        tmp_path / "metadata.jsonl", *({k: v.format(number) for k, v in row.items()} for number in range(2)), "", "  "
    )
    return tmp_path


def test_an_image_folder_gives_picture_condition_and_caption(folder: Path) -> None:
    entries = read_listing(folder)
    assert [entry.name for entry in entries] == ["images/0.png", "images/1.png"]
    pairs = FolderPairs(entries)
    assert (len(pairs), pairs.endless) == (2, False)
    pair = pairs.pair(1)
    assert (pair.prompt, pair.image.getpixel((0, 0))[0], pair.condition.getpixel((0, 0))[0]) == ("picture 1", 1, 101)


def test_controlnets_tutorial_layout_has_the_condition_as_source(tmp_path: Path) -> None:
    save(tmp_path / "source" / "0.png", shade=7)
    save(tmp_path / "target" / "0.png", shade=9)
    lines(tmp_path / "prompt.json", {"source": "source/0.png", "target": "target/0.png", "prompt": "a circle"})
    pair = FolderPairs(read_listing(tmp_path)).pair(0)
    assert (pair.prompt, pair.image.getpixel((0, 0))[0], pair.condition.getpixel((0, 0))[0]) == ("a circle", 9, 7)


def test_other_keys_are_named_by_the_columns(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "hint": "a.png", "caption": "x"})
    (entry,) = read_listing(tmp_path, Columns(condition="hint", caption="caption"))
    assert (entry.condition, entry.prompt) == (tmp_path / "a.png", "x")


def test_prompt_does_as_well_as_text(tmp_path: Path) -> None:
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "prompt": "x"})
    (entry,) = read_listing(tmp_path)
    assert (entry.condition, entry.prompt) == (None, "x")


@pytest.mark.parametrize(
    ("row", "number"), [("{broken", 2), ({"file_name": "a.png"}, 2), ('["a.png"]', 2), ({"text": "x"}, 2)]
)
def test_a_line_that_is_not_what_it_should_be_is_named(row: Any, number: int, tmp_path: Path) -> None:
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "x"}, row)
    with pytest.raises(ValueError, match=rf'metadata.jsonl, line {number}: .*"file_name": ….*is expected, not'):
        read_listing(tmp_path)


def test_no_listing_an_empty_one_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither metadata.jsonl nor prompt.json"):
        read_listing(tmp_path)
    lines(tmp_path / "metadata.jsonl", "")
    with pytest.raises(ValueError, match="is empty: it should have a line for each picture"):
        read_listing(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist; check the path"):
        read_listing(tmp_path / "nowhere")


def test_all_that_is_wrong_with_the_files_is_said_at_once(folder: Path) -> None:
    (folder / "images" / "0.png").unlink()
    save(folder / "maps" / "1.png", size=(48, 64))
    with pytest.raises(ValueError) as refused:
        FolderPairs(read_listing(folder))
    said = str(refused.value)
    assert "2 problems with the training pairs" in said
    assert f"{folder / 'images' / '0.png'} is missing" in said
    assert f"1.png has 64 x 48 pixels, its condition {folder / 'maps' / '1.png'} 48 x 64" in said


def test_of_many_problems_the_first_are_shown(tmp_path: Path) -> None:
    lines(tmp_path / "metadata.jsonl", *({"file_name": f"{n}.png", "text": "x"} for n in range(20)))
    with pytest.raises(ValueError, match=r"20 problems(.|\n)*7.png is missing\n  … and 12 more$"):
        FolderPairs(read_listing(tmp_path))


def test_a_condition_that_is_no_picture_is_named_at_once(folder: Path) -> None:
    (folder / "maps" / "0.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"maps/0.png is no readable picture"):
        FolderPairs(read_listing(folder))


def test_a_condition_that_is_cut_off_is_named_when_it_is_read(folder: Path) -> None:
    path = folder / "maps" / "0.png"
    values = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    pairs = FolderPairs(read_listing(folder))
    with pytest.raises(UnreadableImageError, match=r"maps/0.png: cannot be decoded"):
        pairs.pair(0)


def test_a_photo_turned_by_its_exif_fits_an_upright_condition(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 48))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    save(tmp_path / "m.png", size=(48, 64))
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.jpg", "conditioning_image": "m.png", "text": "x"})
    pair = FolderPairs(read_listing(tmp_path)).pair(0)
    assert pair.image.size == pair.condition.size == (48, 64)


def test_a_map_of_grey_ids_is_coloured_and_a_palette_map_is_taken_as_it_looks(tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(ids).save(tmp_path / "grey.png")
    own = Image.frombytes("P", (4, 3), ids.tobytes())
    own.putpalette([value for index in range(256) for value in (index, 0, 255 - index)])
    own.save(tmp_path / "own.png")
    assert np.array_equal(load_condition(tmp_path / "grey.png", True), colour_map(ids))
    assert np.array_equal(load_condition(tmp_path / "grey.png", False), np.stack([ids] * 3, -1))
    assert np.array_equal(np.asarray(load_condition(tmp_path / "own.png", True))[..., 0], ids)
    assert load_condition(tmp_path / "grey.png", True).getpixel((3, 2)) == MAP_PALETTE[11]


def test_a_map_with_ids_that_have_no_colour_names_the_file(tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 4), 300, np.uint16)).save(tmp_path / "many.png")
    with pytest.raises(UnreadableImageError, match=r"many.png: .*from 300 to 300"):
        load_condition(tmp_path / "many.png", True)


def test_pictures_alone_take_their_captions_from_text_files(tmp_path: Path) -> None:
    save(tmp_path / "b.png")
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog\n")
    assert [(entry.name, entry.prompt, entry.condition) for entry in plain_listing(tmp_path)] == [
        ("a.png", "a dog", None),
        ("b.png", "", None),
    ]


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Path]:
    """A folder with a parquet file, as datasets of the Hub are."""
    datasets = pytest.importorskip("datasets")

    def make(**columns: list[Any]) -> Path:
        table = datasets.Dataset.from_dict(columns)
        for name, values in columns.items():
            if str(values[0]).endswith(".png") and name != "text":
                table = table.cast_column(name, datasets.Image())
        table.to_parquet(tmp_path / "set" / "train.parquet")
        return tmp_path / "set"

    (tmp_path / "set").mkdir()
    return make


def test_a_dataset_gives_picture_condition_and_caption(dataset: Callable[..., Path], folder: Path) -> None:
    files = [[str(folder / kind / f"{n}.png") for n in range(2)] for kind in ("images", "maps")]
    name = dataset(photo=files[0], hint=files[1], text=["one", "two"])
    pairs = DatasetPairs(str(name), Columns(image="photo", condition="hint"))
    pair = pairs.pair(1)
    assert len(pairs) == 2
    assert (pair.prompt, pair.image.getpixel((0, 0))[0], pair.condition.getpixel((0, 0))[0]) == ("two", 1, 101)
    assert DatasetPairs(str(name), Columns(image="photo"), condition=False).pair(0).condition is None


def test_captions_are_read_without_pictures(dataset: Callable[..., Path], folder: Path) -> None:
    files = [str(save(folder / "images" / f"{n}.png")) for n in range(3)]
    name = dataset(image=files, text=[["one", "two"], ["three"], None])
    pairs = DatasetPairs(str(name), Columns(), condition=False)
    for number in range(3):
        (folder / "images" / f"{number}.png").unlink()
    assert list(pairs.captions()) == ["one", "two", "three", ""]


def test_captions_of_a_folder_are_those_of_its_lines(folder: Path) -> None:
    assert list(FolderPairs(read_listing(folder)).captions()) == ["picture 0", "picture 1"]


def test_columns_that_are_not_there_or_hold_no_pictures(dataset: Callable[..., Path], folder: Path) -> None:
    name = dataset(image=[str(folder / "images" / "0.png")], conditioning_image=["nothing"], text=["one"])
    with pytest.raises(ValueError, match="no column 'caption' but image, conditioning_image, text: name yours"):
        DatasetPairs(str(name), Columns(caption="caption"))
    with pytest.raises(ValueError, match=r"the column 'conditioning_image' of .* holds no pictures"):
        DatasetPairs(str(name), Columns())


def test_a_dataset_whose_sizes_differ_says_which_row(dataset: Callable[..., Path], tmp_path: Path) -> None:
    files = [str(save(tmp_path / "a.png")), str(save(tmp_path / "b.png", size=(32, 32)))]
    pairs = DatasetPairs(str(dataset(image=files[:1], conditioning_image=files[1:], text=["x"])), Columns())
    with pytest.raises(ValueError, match=r"row 0 of .*: the picture has 64 x 48 pixels, its condition 32 x 32"):
        pairs.pair(0)


def test_a_dataset_that_cannot_be_loaded(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="cannot be loaded"):
        DatasetPairs(str(tmp_path / "nowhere"), Columns())


def test_grey_maps_of_a_dataset_are_coloured_as_those_of_a_folder(dataset: Callable[..., Path], tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(ids).save(tmp_path / "map.png")
    save(tmp_path / "a.png", size=(4, 3))
    name = dataset(image=[str(tmp_path / "a.png")], conditioning_image=[str(tmp_path / "map.png")], text=["x"])
    assert np.array_equal(DatasetPairs(str(name), Columns(), maps=True).pair(0).condition, colour_map(ids))
    assert np.array_equal(np.asarray(DatasetPairs(str(name), Columns()).pair(0).condition)[..., 0], ids)


def test_a_caption_that_is_null_is_empty(tmp_path: Path) -> None:
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": None})
    assert read_listing(tmp_path)[0].prompt == ""


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "images/../../a.png"])
@pytest.mark.parametrize("key", ["file_name", "conditioning_image"])
def test_names_that_lead_out_of_the_folder_need_a_flag(tmp_path: Path, name: str, key: str) -> None:
    row = {"file_name": "a.png", "conditioning_image": "b.png", "text": "x"} | {key: name}
    lines(tmp_path / "metadata.jsonl", row)
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 1 names .*a.png, which is not inside.*--allow_outside"):
        read_listing(tmp_path)
    (entry,) = read_listing(tmp_path, allow_outside_paths=True)
    assert tmp_path / name in (entry.image, entry.condition)


def test_a_pipe_as_listing_or_as_picture_is_named(folder: Path) -> None:
    (folder / "maps" / "0.png").unlink()
    os.mkfifo(folder / "maps" / "0.png")
    (folder / "images" / "1.png").unlink()
    (folder / "images" / "1.png").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"(?s)maps/0.png is a named pipe.*images/1.png is a character device"):
        FolderPairs(read_listing(folder))
    (folder / "metadata.jsonl").unlink()
    os.mkfifo(folder / "metadata.jsonl")
    with pytest.raises(OSError, match=r"metadata.jsonl is a named pipe"):
        read_listing(folder)


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"file_name":' * 50_000, '{"file_name": "a.png", "file_name": "b.png", "text": "x"}']
)
def test_a_line_that_is_a_bomb_is_named_like_any_other(tmp_path: Path, line: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 1: .*is expected, not") as error:
        read_listing(tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_and_separators_in_captions_are_read(tmp_path: Path, end: str) -> None:
    rows = [json.dumps({"file_name": "a.png", "text": f"one\u2028two\x85{n}"}, ensure_ascii=False) for n in range(2)]
    (tmp_path / "metadata.jsonl").write_bytes(end.join(rows).encode("utf-8-sig"))
    assert [entry.prompt for entry in read_listing(tmp_path)] == [f"one\u2028two\x85{n}" for n in range(2)]


def test_a_listing_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "süß"}', encoding="latin-1")
    with pytest.raises(ValueError, match=r"metadata.jsonl is not UTF-8"):
        read_listing(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"), [(["a", "b"], ("a", "b")), ([], ("",)), (["a", None], ("a", "")), (3, ("3",)), ("a", ("a",))]
)
def test_a_picture_may_have_several_captions(tmp_path: Path, text: Any, expected: tuple[str, ...]) -> None:
    save(tmp_path / "a.png")
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": text})
    entries = read_listing(tmp_path)
    assert entries[0].captions == expected
    assert FolderPairs(entries).pair(0).captions == expected


@pytest.mark.parametrize("text", [{"a": 1}, [["a"]], [{"a": 1}]])
def test_a_caption_that_is_no_text_is_named(tmp_path: Path, text: Any) -> None:
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": text})
    with pytest.raises(ValueError, match=r"line 1: .*is expected, not"):
        read_listing(tmp_path)


def test_a_column_of_several_captions_is_no_text_of_a_list(dataset: Callable[..., Path], tmp_path: Path) -> None:
    name = dataset(image=[str(save(tmp_path / "a.png"))], text=[["one", "two"]])
    pair = DatasetPairs(str(name), Columns(), condition=False).pair(0)
    assert (pair.prompt, pair.captions) == ("one", ("one", "two"))


def test_a_dataset_with_a_picture_of_extreme_shape_names_the_row(dataset: Callable[..., Path], tmp_path: Path) -> None:
    name = dataset(image=[str(save(tmp_path / "a.png", size=(1000, 2)))], text=["x"])
    with pytest.raises(UnreadableImageError, match=r"row 0 of .*1000 x 2 pixels: one side is over 64 times"):
        DatasetPairs(str(name), Columns(), condition=False).pair(0)
