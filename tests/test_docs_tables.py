"""The figures in README and docs are those of the committed result files."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["README.md", "docs/evaluation.md", "docs/performance.md", "docs/families.md"])
def test_every_table_is_what_its_source_says(tables: ModuleType, name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python docs/tables.py"


def test_every_figure_in_a_table_of_the_readme_comes_from_a_result_file(tables: ModuleType) -> None:
    rest = tables.BLOCK.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    typed = [line for line in rest.splitlines() if line.startswith("|") and re.search(r"\d\.\d|\d,\d{3}", line)]
    assert typed == []
    named = {found["name"] for found in tables.BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {"method-parameters", "step-costs", "subjects"} <= named


def test_a_changed_figure_is_noticed(tables: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (figure, *_) = re.findall(r"\b0\.\d{3}\b", tables.BLOCK.search(text, text.index("table: subjects") - 10).group())
    changed = text.replace(figure, "0.999")
    assert tables.filled(changed) == text


def test_the_parameters_are_counted_on_the_architecture(tables: ModuleType) -> None:
    assert json.loads((ROOT / "docs/results/parameters.json").read_text()) == tables.count_parameters()


def test_a_page_that_names_an_unknown_table_is_refused(tables: ModuleType) -> None:
    with pytest.raises(KeyError, match="nothing"):
        tables.filled("<!-- table: nothing -->\n<!-- end -->")
