"""What counts as a line of code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TEXT = '''"""A module.

With a long docstring.
"""

import os  # not a comment alone

NAME = 1
"""What it is."""


def function(
    first: int,

    # a comment
) -> str:
    """What it does."""
    return """a string

that is a value"""
'''


def test_blank_lines_comments_and_docstrings_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import code_lines

    assert code_lines.code_lines(TEXT) == 1 + 1 + 3 + 3  # import, name, signature, the string that is returned
    (tmp_path / "a.py").write_text(TEXT)
    (tmp_path / "b.py").write_text("x = 1\n")
    monkeypatch.setattr(sys, "argv", ["code_lines.py", str(tmp_path), str(tmp_path / "b.py")])
    code_lines.main()
    counts = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert counts == ["8", "1", "9"]  # a file that is named twice counts once
