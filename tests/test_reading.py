"""Texts, JSON and YAML of others: bombs end in one error that names the file, quickly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ether_diffusion.evaluation.subjects.protocols import load_protocol
from ether_diffusion.reading import TEXT_LIMIT, parse_json, read_bytes, read_text, read_yaml, shown
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BROKEN_YAML = {
    "aliases": (LAUGHS, "its aliases make it larger than 100,000 values"),
    "merged aliases": (LAUGHS.replace("[", "{k: ").replace("]", "}").replace(", ", ", k2: "), "no YAML"),
    "nesting": ("a: " + "[" * 100_000, "nested more than 32 deep"),
    "nested blocks": ("".join(" " * n + "a:\n" for n in range(400)), "nested more than 32 deep"),
    "size": ("a: 1\n" * 100_000, "has more than 262,144 bytes"),
    "a tag of Python": ("a: !!python/object/apply:os.system ['true']", "no YAML that can be read"),
    "syntax": ("a: [1\nb: 2", "line 2"),
    "an alias of nothing": ("a: *b", "undefined alias"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN_YAML.values(), ids=BROKEN_YAML)
def test_broken_yaml_names_its_file_in_every_program(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"settings\.yaml .*{message}"):
        read_yaml(path)
    with pytest.raises(ValueError, match=r"settings\.yaml"):
        load_protocol(str(path), None, tmp_path)
    with pytest.raises(SystemExit, match=r"settings\.yaml") as error:
        parse_config(DreamBoothConfig, ["--config", str(path)])
    assert len(str(error.value)) < 1000


def test_aliases_in_moderation_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a [1, 2]\nb: *a\nc: {<<: {d: 3}}\n")
    assert read_yaml(path) == {"a": [1, 2], "b": [1, 2], "c": {"d": 3}}


def test_a_config_that_holds_no_settings_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(SystemExit, match=r"a\.yaml holds no settings"):
        parse_config(DreamBoothConfig, ["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "names 'a' twice"),
        ("1" * 5000, "digits"),
        ("{", "Expecting"),
    ],
)
def test_json_bombs_are_value_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_files_larger_than_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    os.truncate(path, TEXT_LIMIT + 1)  # a sparse file
    with pytest.raises(ValueError, match=r"a\.jsonl has more than 268,435,456 bytes"):
        read_text(path)
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_bytes(path, 4)


VALUES = ["\x1b[2J" * 100, [[]] * 100, {"a": {}}, 10**5000, -(10**80), 1e300, None, "é"]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_what_messages_show_of_a_value_is_short_and_printable(value: object) -> None:
    assert len(shown(value)) <= 81
    assert shown(value).isprintable()


def test_shown_values_look_like_json_or_python() -> None:
    assert [shown(each) for each in (3, "no", None, True, [1])] == ["3", "'no'", "None", "True", "a list"]
    assert json.loads(shown(0.5)) == 0.5
