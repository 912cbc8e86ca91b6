"""What the site makes from the source: the list of errors, the reference, the links; ``make docs`` builds all of it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import ether_diffusion as ether
from ether_diffusion.data.metadata import read_metadata
from ether_diffusion.recipes import find_config
from ether_diffusion.runs.record import read_run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
from errors import GAP, PACKAGE, as_markdown, messages, read  # noqa: E402

MESSAGES = messages()
TROUBLES = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


def said_by(action: Callable[[], object]) -> str:
    with pytest.raises((ValueError, OSError)) as raised:
        action()
    return str(raised.value)


def listed(said: str, kind: str) -> bool:
    """Whether the list has a text that a message answers to, wherever it stands in the message."""
    patterns = (".*".join(map(re.escape, each.text.split(GAP))) for each in MESSAGES if each.kind == kind)
    return any(re.search(pattern, " ".join(said.split()), flags=re.DOTALL) for pattern in patterns)


def pieces(node: ast.expr) -> list[str]:
    """The strings of an expression that are not inside of a value."""
    values = {id(inner) for each in ast.walk(node) if isinstance(each, ast.FormattedValue) for inner in ast.walk(each)}
    constants = (each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and id(each) not in values)
    return [" ".join(each.split()) for each in constants if isinstance(each, str)]


def test_every_raise_with_a_text_is_in_the_list() -> None:
    """Counted by another way: the longest piece of text that stands in a raise is part of an entry of its room."""
    texts: dict[str, list[str]] = {}
    for each in MESSAGES:
        texts.setdefault(each.room, []).append(each.text)
    found, missing = 0, []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                longest = max(pieces(node.exc.args[0]), key=len, default="")
                if len(longest.split()) > 2:
                    found += 1
                    if not any(longest in text for text in texts.get(room, [])):
                        missing.append((path.name, node.lineno, longest))
    assert missing == []
    assert found > 400


def test_errors_as_they_are_raised_are_in_the_list(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\nmissing.png,a dog\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    model = torch.nn.Linear(4, 4)
    provoked: list[tuple[Callable[[], object], str]] = [
        (lambda: ether.EtherConfig(method="eter"), "ValueError"),
        (lambda: ether.EtherConfig(n_blocks=0), "ValueError"),
        (lambda: ether.attach(model, ether.EtherConfig()), "ValueError"),
        (lambda: find_config("no_such_recipe"), "FileNotFoundError"),
        (lambda: read_run(tmp_path), "FileNotFoundError"),
        (lambda: read_metadata(tmp_path, "text"), "ValueError"),
    ]
    for action, kind in provoked:
        said = said_by(action)
        assert listed(said, kind), said
    assert not listed("an error of nobody", "ValueError")


def test_texts_are_found_where_they_are_written() -> None:
    source = """
def reason(a):
    return f"{a} is damaged: it has no name"

class OwnError(ValueError):
    def __init__(self, path):
        super().__init__(f"the file {path} is gone")

def work(parser, x):
    if x:
        raise ValueError("give two " f"numbers, not {x}{x}")
    parser.error("the folder is full")
    raise _made(x)

def _made(x):
    return KeyError(reason(x))
"""
    found = sorted((kind, text) for _, kind, text in read(source))
    assert found == [
        ("KeyError", "… is damaged: it has no name"),
        ("OwnError", "the file … is gone"),
        ("ValueError", "give two numbers, not …"),
        ("message", "the folder is full"),
    ]


def test_errors_with_advice_exist_as_they_are_written() -> None:
    advised = re.findall(r"^### (`+)(.+)\1$", TROUBLES, flags=re.MULTILINE)
    assert len(advised) > 20
    assert {text for _, text in advised} - {each.text for each in MESSAGES} == set()
    assert TROUBLES.count("<!-- errors -->") == 1


def test_the_list_has_a_row_for_each_error() -> None:
    rows = [line for line in as_markdown(MESSAGES).splitlines() if line.startswith("| `")]
    assert len(rows) == len(MESSAGES)
    assert all(len(re.split(r"(?<!\\)\|", row)) == 4 for row in rows)


def test_the_reference_has_every_public_name() -> None:
    page = (DOCS / "reference/index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: ether_diffusion\.(\w+)$", page, flags=re.MULTILINE)) == sorted(ether.__all__)


@pytest.mark.parametrize(
    ("tag", "address"),
    [
        ('<script async src="https://host/a.js">', "https://host/a.js"),
        ('<link rel="stylesheet" href="//host/a.css">', "//host/a.css"),
        ('<img alt="a" src=http://host/a.png>', "http://host/a.png"),
        ('<a href="https://host/page">', None),
        ('<img src="pictures/a.png">', None),
        ('<script src="assets/a.js">', None),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(tag: str, address: str | None) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    from hooks import LOADED

    found = LOADED.search(f"<p>text</p>{tag}")
    assert (found and found["address"]) == address
