"""What is installed, told from the metadata of packages."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from ether_diffusion.doctor.packages import Extra, extras, unmet, versions

METADATA = """Metadata-Version: 2.1
Name: tool-of-tests
Version: 1
Requires-Dist: numpy>=1
Requires-Dist: pillow<1
Requires-Dist: nowhere-to-be-found; python_version < "3"
Requires-Dist: scipy; extra == "there"
Requires-Dist: scipy; extra == "half"
Requires-Dist: nowhere-to-be-found>=2; extra == "half"
Requires-Dist: tool-of-tests[half]; extra == "nested"
Requires-Dist: also-nowhere; extra == "nested"
Requires-Dist: ruff; extra == "dev"
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that is installed, by its metadata."""
    folder = tmp_path / "tool_of_tests-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(tmp_path)
    return "tool-of-tests"


def test_an_extra_names_what_it_lacks_and_the_command_that_installs_it(tool: str) -> None:
    assert extras(tool) == [
        Extra("there", (), True, "pip install 'tool-of-tests[there]'"),
        Extra("half", ("nowhere-to-be-found",), True, "pip install 'tool-of-tests[half]'"),
        Extra("nested", ("nowhere-to-be-found", "also-nowhere"), False, "pip install 'tool-of-tests[nested]'"),
    ]


def test_a_requirement_of_another_version_is_not_met(tool: str) -> None:
    assert unmet(tool) == [f"pillow <1 (it is {version('pillow')})"]


def test_every_extra_but_that_of_developers_is_listed() -> None:
    names = [extra.name for extra in extras()]
    assert {"peft", "clip", "heic", "quantization"} <= set(names)
    assert "dev" not in names


def test_versions_are_those_of_the_modules() -> None:
    import diffusers
    import torch

    found = versions()
    assert (found["torch"], found["diffusers"]) == (torch.__version__, diffusers.__version__)
