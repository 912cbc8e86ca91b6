"""What a page may run: its own programs, whose hashes it names, and nothing that is written into it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest
from page.chromium import Opener, needs_chromium

from ether_diffusion.page.render import SCRIPTS, render, script

TEMPLATE = """{% extends "page.html.jinja" %}
{% from "parts.html.jinja" import picture %}
{% set scripts = ["sortable"] %}
{% block title %}{{ text }}{% endblock %}
{% block main %}<p id="text" title="{{ text }}">{{ text }}</p>{{ addition }}
<div class="scroll" tabindex="0"><table class="sortable"><thead><tr><th>Name</th></tr></thead>
<tbody><tr><td>{{ text }}</td></tr></tbody></table></div>{% endblock %}
"""
HOSTILE = (
    """"'></p></title></script><script>document.title = "taken"</script><img src=x onerror="alert(1)">{{ 7 * 7 }}"""
)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "a.html.jinja"
    path.write_text(TEMPLATE)
    return path


def test_a_page_names_the_hashes_of_exactly_its_own_programs(template: Path) -> None:
    html = render(template, {}, text=HOSTILE, addition="")
    programs = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert programs == [script("enlarge"), script("sortable")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in programs]
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', html)
    assert re.findall(r"script-src ([^;]*)", policy) == [" ".join(f"'sha256-{each}'" for each in hashes)]
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("path", sorted(SCRIPTS.iterdir()), ids=lambda path: path.stem)
def test_a_program_can_stand_in_a_page(path: Path) -> None:
    """No ``</script`` ends it early, and none makes markup from text."""
    text = path.read_text()
    assert "</" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)


@needs_chromium
def test_text_is_text_and_a_script_that_gets_in_does_not_run(template: Path, tmp_path: Path, open_page: Opener) -> None:
    from markupsafe import Markup

    inside = Markup("<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">")
    place = tmp_path / "page.html"
    place.write_text(render(template, {}, text=HOSTILE, addition=inside))
    page = open_page(place)
    assert page.title() == HOSTILE
    assert page.locator("#text").inner_text() == page.locator("#text").get_attribute("title") == HOSTILE
    assert page.get_by_role("button", name="Name").count() == 1  # what the page's own program made
