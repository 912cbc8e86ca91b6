"""What a release says of itself agrees wherever it stands, and its description has no link that leads nowhere."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
from links import at_repository, relinked  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
TEXT = """[a page](docs/a.md#part), [the paper](https://arxiv.org/abs/1), [here](#part)

![a picture](docs/a.png)

```bash
echo [not](a/link)
```
"""


def test_the_version_is_the_changelogs_newest() -> None:
    """A version of development belongs to a heading that says unreleased, a final one to a heading with a date."""
    headings = re.findall(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    name, state = headings[0]
    version = Version(PROJECT["version"])
    assert version.base_version == name
    assert version.is_devrelease == (state == "unreleased")
    assert version.is_devrelease or re.fullmatch(r"\d{4}-\d\d-\d\d", state)
    assert CITATION["version"] == PROJECT["version"]


def test_the_citation_names_the_paper_and_the_licence_of_the_project() -> None:
    paper = CITATION["preferred-citation"]
    assert PROJECT["urls"]["Paper"] == paper["url"]
    assert CITATION["license"] == PROJECT["license"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Bini", "Roth", "Akata", "Khoreva"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (None, ("a page, ", "\n\n\n\n```")),
        (
            "https://host/o/n",
            (
                "[a page](https://host/o/n/blob/main/docs/a.md#part), ",
                "![a picture](https://host/o/n/raw/main/docs/a.png)",
            ),
        ),
    ],
)
def test_relative_links_lead_to_the_repository_or_are_text(address: str | None, expected: tuple[str, str]) -> None:
    found = relinked(TEXT, at_repository(address))
    for part in (*expected, "[the paper](https://arxiv.org/abs/1)", "[here](#part)", "echo [not](a/link)"):
        assert part in found
