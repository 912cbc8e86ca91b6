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


PAGES = [
    page for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if "<!-- table: " in page.read_text("utf-8")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_is_what_its_source_says(tables: ModuleType, page: Path) -> None:
    assert page in tables.PAGES
    text = page.read_text(encoding="utf-8")
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


def test_the_language_models_are_counted_on_the_architectures(tables: ModuleType) -> None:
    assert json.loads((ROOT / "docs/results/language-parameters.json").read_text()) == tables.count_language()


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("parameters")


def test_the_presets_are_counted_on_the_architectures(counting: ModuleType) -> None:
    written = json.loads((ROOT / "docs/results/targets.json").read_text())
    assert list(written) == list(counting.BASES)
    names = ["SD1.5", "FLUX.2 klein 4B"]  # the smaller ones; python benchmarks/parameters.py counts all
    assert counting.count(names) == {name: written[name] for name in names}


def test_the_counts_of_fused_linears_follow_from_their_widths() -> None:
    """Per Linear of ETHER+, two vectors on each side: 2 (in + out), of which attention leaves out the MLP's parts."""
    presets = json.loads((ROOT / "docs/results/targets.json").read_text())["FLUX.2 klein 4B"]["presets"]
    width, mlp, double, single = 3072, 9216, 5, 20
    square = 2 * (width + width)
    attention = double * 8 * square + single * (2 * (width + 3 * width) + square)
    feed_forward = double * 2 * (2 * (width + 2 * mlp) + 2 * (mlp + width)) + single * 2 * (2 * mlp + mlp)
    assert presets["attention"]["ether_plus"] == attention
    assert presets["attention+mlp"]["ether_plus"] == attention + feed_forward
    assert presets["self"]["ether_plus"] + presets["cross"]["ether_plus"] == attention


def test_a_page_that_names_an_unknown_table_is_refused(tables: ModuleType) -> None:
    with pytest.raises(KeyError, match="nothing"):
        tables.filled("<!-- table: nothing -->\n<!-- end -->")
