"""metadata.jsonl and metadata.csv of an image folder: what they say, and what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from ether_diffusion.data.metadata import read_metadata
from ether_diffusion.data.pairs import Columns, read_listing

JSONL, CSV = "metadata.jsonl", "metadata.csv"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/er/c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def captions(folder: Path, column: str = "text") -> dict[str, tuple[str, ...]]:
    found = read_metadata(folder, column)
    assert found is not None
    return found.captions


def refusal(folder: Path, column: str = "text") -> str:
    with pytest.raises(ValueError) as refused:
        read_metadata(folder, column)
    return str(refused.value)


def rows(folder: Path, *lines: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / JSONL).write_text(text, encoding="utf-8")


def test_a_folder_without_a_listing_has_no_metadata(folder: Path) -> None:
    assert read_metadata(folder, "text") is None


def test_both_formats_say_the_same(folder: Path) -> None:
    expected = {"a.png": ("a dog, on grass",), "deep/er/c.png": ('a "big" dog',), "b.png": ()}
    (folder / CSV).write_text(
        'text,file_name,seed\n"a dog, on grass",a.png,1\n\n"a ""big"" dog",./deep/er/c.png,2\n"",b.png,3\n'
    )
    assert captions(folder) == expected
    (folder / CSV).unlink()
    rows(
        folder,
        {"file_name": "a.png", "text": " a dog, on grass "},
        "",
        {"file_name": "./deep//er/c.png", "text": 'a "big" dog'},
        {"file_name": "b.png", "text": None},
    )
    assert captions(folder) == expected


def test_a_list_in_json_has_several_captions_each_once(folder: Path) -> None:
    rows(folder, {"file_name": "a.png", "text": ["a dog", "", "one dog ", "a dog"]})
    assert captions(folder) == {"a.png": ("a dog", "one dog")}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_the_ends_of_windows_are_read(folder: Path, end: str) -> None:
    text = end.join(["file_name,text", "a.png,süß", 'b.png,"one\ntwo"', ""])
    (folder / CSV).write_bytes(text.encode("utf-8-sig"))
    assert captions(folder) == {"a.png": ("süß",), "b.png": ("one\ntwo",)}


def test_another_column_is_named(folder: Path) -> None:
    (folder / CSV).write_text("file_name,caption\na.png,a dog\n")
    assert captions(folder, "caption") == {"a.png": ("a dog",)}
    said = refusal(folder)
    assert f"{CSV}, line 2 has no column 'text' but file_name, caption; name yours with --caption_column" in said
    rows(folder, {"file_name": "a.png", "text": "a dog"}, {"file": "b.png", "text": "x"})
    (folder / CSV).unlink()
    assert f"{JSONL}, line 2 has no column 'file_name' but file, text" in refusal(folder)


def test_files_that_are_missing_are_listed_with_their_lines(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    rows(folder, *({"file_name": name, "text": "x"} for name in ("a.png", "z.png", "deep", "notes.txt", JSONL)))
    said = refusal(folder)
    assert f"{folder / JSONL} names 4 pictures that are not in {folder}:" in said
    assert [line.rpartition(", ")[2] for line in said.splitlines()[1:]] == [
        "line 2: z.png",
        "line 3: deep",
        "line 4: notes.txt",
        f"line 5: {JSONL}",
    ]
    rows(folder, *({"file_name": f"{number}.png", "text": "x"} for number in range(20)))
    assert refusal(folder).endswith("line 8: 7.png\n  … and 12 more")


def test_a_picture_that_is_named_twice_is_refused_with_both_lines(folder: Path) -> None:
    rows(folder, {"file_name": "a.png", "text": "x"}, {"file_name": "./a.png", "text": "y"})
    assert f"{JSONL}, line 2 names ./a.png, which {folder / JSONL}, line 1 names already" in refusal(folder)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "deep/../../a.png"])
def test_names_that_lead_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    rows(folder, {"file_name": name, "text": "x"})
    assert f"{JSONL}, line 1 names {name}, which is not inside of the folder: move the file there" in refusal(folder)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", '{"file_name": …, "text": …} is expected, not {broken'),
        ('["a.png"]', "is expected, not"),
        ('{"file_name": "b.png", "file_name": "a.png", "text": "x"}', "is expected, not"),
        ('{"file_name": 3, "text": "x"}', "file_name is 3, the name of a file is expected"),
        ('{"file_name": " ", "text": "x"}', "file_name is ' ', the name of a file is expected"),
        ('{"file_name": "b.png", "text": {"a": 1}}', "a caption is a text or a list of texts, not a dict"),
        ('{"file_name": "b.png", "text": "\\ud800"}', "has half of a character"),
    ],
)
def test_a_broken_line_of_json_is_named(folder: Path, line: str, said: str) -> None:
    rows(folder, {"file_name": "a.png", "text": "x"}, line)
    assert f"{JSONL}, line 2: " in (message := refusal(folder))
    assert said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name,text\na.png,a dog, grass\n", "line 2 has 3 cells, the header 2: a caption with commas is put in"),
        ("file_name,text\na.png\n", "line 2 has 1 cells, the header 2"),
        ('file_name,text\na.png,"one\ntwo"\nb.png,"open\n', "line 4 is no CSV that can be read"),
        ("file_name;text\na.png;x\n", "line 1 is 'file_name;text': columns are separated by commas"),
        ("file_name,text,text\na.png,x,y\n", "line 1 names the column 'text' twice"),
        ("file_name,text\n", "metadata.csv is empty: it should have a row for each picture"),
        ("", "metadata.csv is empty"),
        ("file_name,text\na.png," + "x" * 200_000 + "\n", "line 2 is no CSV that can be read (field larger than"),
    ],
)
def test_a_broken_line_of_csv_is_named(folder: Path, text: str, said: str) -> None:
    (folder / CSV).write_text(text)
    assert said in refusal(folder)


def test_both_listings_in_one_folder_are_refused(folder: Path) -> None:
    rows(folder, {"file_name": "a.png", "text": "x"})
    (folder / CSV).write_text("file_name,text\na.png,x\n")
    assert refusal(folder) == f"{folder} holds both metadata.jsonl and metadata.csv: remove one of them"


def test_a_pipe_in_place_of_a_listing_or_a_picture_is_never_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    rows(folder, {"file_name": "pipe.png", "text": "x"})
    assert "line 1: pipe.png" in refusal(folder)
    (folder / JSONL).unlink()
    os.mkfifo(folder / CSV)
    with pytest.raises(OSError, match=r"metadata.csv is a named pipe"):
        read_metadata(folder, "text")


def test_a_listing_in_another_encoding_is_named(folder: Path) -> None:
    (folder / CSV).write_bytes("file_name,text\na.png,süß\n".encode("latin-1"))
    assert f"{folder / CSV} is not UTF-8" in refusal(folder)


def test_pairs_may_be_listed_as_csv(folder: Path) -> None:
    (folder / CSV).write_text('file_name,hint,caption\na.png,b.png,"a dog, grass"\nb.png,,x\n')
    first, second = read_listing(folder, Columns(condition="hint", caption="caption"))
    assert (first.image, first.condition, first.prompt) == (folder / "a.png", folder / "b.png", "a dog, grass")
    assert second.condition is None
