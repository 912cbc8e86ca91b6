"""Lines of code of Python files, without blank lines, comments and docstrings.

    python benchmarks/code_lines.py ether_diffusion/peft_tuner
    python benchmarks/code_lines.py ether_diffusion/core/host.py ether_diffusion/core/adapter.py

It prints a line for each file, and their sum.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from pathlib import Path

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
"""Tokens that are no code."""


def code_lines(text: str) -> int:
    """How many lines of a Python text have code."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - _alone(ast.parse(text)))


def _alone(tree: ast.Module) -> set[int]:
    """The lines of strings that stand alone: docstrings of modules, classes and functions, and of names."""
    strings = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
    return {line for each in strings for line in range(each.lineno, (each.end_lineno or each.lineno) + 1)}


def main() -> None:
    """Count the files that the command line names, and those in its folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", type=Path, metavar="PLACE", help="a Python file or a folder of such")
    places: list[Path] = parser.parse_args().places
    files = [file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    counts = {file: code_lines(file.read_text(encoding="utf-8")) for file in files}
    for file, count in counts.items():
        print(f"{count:6,}  {file}")
    print(f"{sum(counts.values()):6,}  in all")


if __name__ == "__main__":
    main()
