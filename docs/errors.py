"""Every error of the package by its text, read from the source: ``python docs/errors.py`` prints the list as Markdown.

The site has it at the end of the page *Troubleshooting*, where it is made anew by every build.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ether_diffusion"
GAP = "…"
"""What stands for a value in a text."""


@dataclass(frozen=True)
class Message:
    """An error that the source can raise.

    Attributes:
        room: of the package, such as ``training``.
        file: relative to the package.
        line: of the source.
        kind: name of the exception; ``message`` of what is printed or logged without one.
        text: with ``…`` for every value.
    """

    room: str
    file: str
    line: int
    kind: str
    text: str


def messages(package: Path = PACKAGE) -> list[Message]:
    """The errors of all files, by room, then by text."""
    found: dict[tuple[str, str], Message] = {}
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        for line, kind, text in read(path.read_text(encoding="utf-8")):
            room = file.partition("/")[0].removesuffix(".py")
            found.setdefault((room, text), Message(room, file, line, kind, text))
    return sorted(found.values(), key=lambda each: (each.room, each.text.strip(GAP + " ").lower()))


def read(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, kind and text of every error that a source makes, raised there or handed to what raises it."""
    tree = ast.parse(source)
    raised = {id(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    elsewhere = _texts_by_name(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
            made = [each for each in ast.walk(node) if isinstance(each, ast.Call) and _name(each.func) == "__init__"]
            yield from ((call.lineno, node.name, text) for call in made for text in _first(call, elsewhere))
        elif isinstance(node, ast.Call):
            name = _name(node.func)
            said = isinstance(node.func, ast.Attribute) and name == "error"  # of a parser, or logged
            if said or id(node) in raised or name.endswith(("Error", "SystemExit")):
                kind = "message" if said or name == "SystemExit" else _kind(name, elsewhere)
                yield from ((node.lineno, kind, text) for text in _first(node, elsewhere))


def _kind(name: str, elsewhere: Mapping[str, list[ast.expr]]) -> str:
    """The exception of that name, or what the function of that name makes."""
    made = [_name(each.func) for each in elsewhere.get(name, []) if isinstance(each, ast.Call)]
    return made[0] if made else name


def _first(call: ast.Call, elsewhere: Mapping[str, list[ast.expr]]) -> list[str]:
    """The texts of the first argument that has any."""
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    return next((found for each in arguments if (found := _texts(each, elsewhere))), [])


def _texts_by_name(tree: ast.AST) -> dict[str, list[ast.expr]]:
    """What every variable of a file is set to, and every function of it returns."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                found.setdefault(_name(target), []).append(node.value)
        elif isinstance(node, ast.FunctionDef):
            returned = [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
            found.setdefault(node.name, []).extend(returned)
    return found


def _texts(node: ast.expr, elsewhere: Mapping[str, list[ast.expr]], depth: int = 3) -> list[str]:
    """The texts that an expression may have, as far as they are written in this file."""
    if isinstance(node, ast.IfExp):
        return _texts(node.body, elsewhere, depth) + _texts(node.orelse, elsewhere, depth)
    name = _name(node.func) if isinstance(node, ast.Call) else _name(node)
    if name and depth:
        return [text for value in elsewhere.get(name, []) for text in _texts(value, elsewhere, depth - 1)]
    text = " ".join(_text(node).split())
    return [text] if len(re.findall(r"[^\W\d_]{2,}", text)) > 1 else []  # one word is no message


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.expr) -> str:
    """A string of the source as far as it is written there; a value, or what is not written there, is a gap."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return re.sub(f"{GAP}+", GAP, "".join(_text(value) for value in values))
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _text(left) + _text(right)
    return GAP


def as_markdown(found: list[Message]) -> str:
    """A table for each room."""
    lines: list[str] = []
    for room in sorted({each.room for each in found}):
        lines += [f"### {room}", "", "| text | kind |", "|---|---|"]
        lines += [f"| {_code(each.text)} | {_code(each.kind)} |" for each in found if each.room == room] + [""]
    return "\n".join(lines)


def _code(text: str) -> str:
    """As code in a cell of a table."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}".replace("|", "\\|")


if __name__ == "__main__":
    print(as_markdown(messages()))
