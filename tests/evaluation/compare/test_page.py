"""The page of a comparison in a real browser: blind mode by mouse and by keys, what it keeps and what it saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from page.chromium import Opener, needs_chromium, seen_at
from PIL import Image

from ether_diffusion.evaluation.compare.columns import columns_of, read_sources
from ether_diffusion.evaluation.compare.page import write_page
from ether_diffusion.evaluation.compare.votes import read_votes, wins
from ether_diffusion.runs.sample import Request

pytestmark = needs_chromium

HOSTILE = "\"'></script><img src=x onerror=alert(1)>"
PROMPTS = [f"a qwe dog in place {number}" for number in range(7)] + [HOSTILE]
SHADES = (20, 90, 170, 250)


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """A page of three runs: each column's pictures have a grey of their own."""
    paths = [tmp_path / name for name in ("dog", "cat", f"<b>{HOSTILE.replace('/', '')}")]
    for path in paths:
        path.mkdir()
        (path / "config.yaml").write_text(
            yaml.safe_dump({"pretrained_model_name_or_path": "playground", "method": "ether"})
        )
        (path / "provenance.json").write_text(json.dumps({"step": 1}))
    sources = read_sources(paths)
    request = Request(PROMPTS, [3], [1.0], 2, 3.0, 64, 64, 4)
    columns = columns_of(sources, [1.0])
    drawn = (
        (column, prompt, 3, Image.new("RGB", (64, 64), (shade,) * 3))
        for column, shade in zip(columns, SHADES, strict=True)
        for prompt in PROMPTS
    )
    return write_page(sources, columns, request, "float32", drawn, tmp_path / "out")


SHOWN = """async row => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d"), greys = [];
  for (const image of row.querySelectorAll("img")) {
    image.loading = "eager";
    await image.decode();
    canvas.drawImage(image, 0, 0, 1, 1);
    greys.push(canvas.getImageData(0, 0, 1, 1).data[0]);
  }
  return greys;
}"""
"""The greys of a row's pictures from left to right."""


def orders(page: object) -> list[list[int]]:
    """Of every row the columns as they stand, the base 0."""
    rows = page.locator("#compared tbody tr:nth-child(2)").all()  # type: ignore[attr-defined]
    return [[min(range(4), key=lambda c: abs(SHADES[c] - grey)) for grey in row.evaluate(SHOWN)] for row in rows]


def test_blind_hides_every_name_and_shuffles_each_row(compared: Path, open_page: Opener) -> None:
    page = open_page(compared)
    assert orders(page) == [[0, 1, 2, 3]] * len(PROMPTS)
    table = page.locator("#compared")
    page.get_by_role("button", name="Compare blind").press("Enter")
    shown = orders(page)
    assert all(order[0] == 0 and sorted(order) == [0, 1, 2, 3] for order in shown)
    assert len(set(map(tuple, shown))) > 1
    assert table.locator("thead").inner_text().split() == ["base", "A", "B", "C"]
    html = table.evaluate("each => each.outerHTML")
    assert not [name for name in ('"dog', ">dog", "cat", "&lt;b&gt;", "strength") if name in html]
    assert page.locator(".slider").is_hidden()
    assert table.get_by_role("img").nth(1).get_attribute("alt") == "Picture A: a qwe dog in place 0, seed 3"
    page.get_by_role("button", name="Show the names").click()
    assert orders(page) == [[0, 1, 2, 3]] * len(PROMPTS)
    assert table.locator("th[data-column='1']").inner_text() == "dog"
    assert page.locator(".slider").is_visible()


def test_choices_are_counted_kept_saved_and_read_back(compared: Path, tmp_path: Path, open_page: Opener) -> None:
    """A reader chooses the second run in five rows by keys alone, nothing in one, the first run in one by mouse."""
    page = open_page(f"{compared.as_uri()}#blind")
    shown = orders(page)
    for number, order in enumerate(shown[:5]):
        row = page.locator("#compared tbody").nth(number)
        row.get_by_role("button", name=f"Choose {'ABC'[order.index(2) - 1]}").focus()
        page.keyboard.press("Space")
    page.locator("#compared tbody").nth(5).get_by_role("button", name="No preference").press("Enter")
    last = page.locator("#compared tbody").nth(7)
    for column in (3, 1):  # a change of mind counts once
        last.get_by_role("button", name=f"Choose {'ABC'[shown[7].index(column) - 1]}").click()
    assert last.locator("[aria-pressed=true]").count() == 1
    status = page.locator("#blind [role=status]")
    assert status.inner_text().strip() == "7 of 8 rows judged."
    page.reload()
    again = orders(page)
    assert [again[n] for n in (0, 1, 2, 3, 4, 5, 7)] == [shown[n] for n in (0, 1, 2, 3, 4, 5, 7)]
    page.get_by_role("button", name="Show the names").click()
    assert "dog 1, cat 5, <b>" in status.inner_text()
    assert "no preference 1" in status.inner_text()
    assert page.locator("#compared td.chosen").count() == 6
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save the choices").click()
    file = tmp_path / "votes.json"
    saved.value.save_as(file)
    found = read_votes(file)
    assert (found["rows"], len(found["votes"])) == (8, 7)
    assert found["votes"][-1]["prompt"] == HOSTILE
    assert [vote["order"] for vote in found["votes"][:5]] == [[c - 1 for c in order[1:]] for order in shown[:5]]
    shares = list(wins([found]).values())
    assert [share.mean for share in shares] == pytest.approx([(1 + 1 / 3) / 7, (5 + 1 / 3) / 7, 1 / 3 / 7])
    page.locator("summary", has_text="Forget the choices").press("Enter")
    page.get_by_role("button", name="Forget all choices").press("Enter")
    page.reload()
    assert "0 of 8 rows judged" in status.inner_text()


def test_a_row_is_judged_by_the_tab_key_and_the_space_bar_alone(compared: Path, open_page: Opener) -> None:
    page = open_page(compared)

    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent") == name:
                return
        raise AssertionError(f"Tab does not reach {name!r}")

    tab_to("Compare blind")
    page.keyboard.press("Space")
    tab_to(f"Choose B: {PROMPTS[0]}, seed 3")
    page.keyboard.press("Space")
    assert "1 of 8 rows judged" in page.locator("#blind [role=status]").inner_text()
    assert page.evaluate("document.activeElement.ariaPressed") == "true"
    tab_to(f"Choose C: {PROMPTS[0]}, seed 3")


def test_damaged_choices_of_the_browser_are_left_out(compared: Path, open_page: Opener) -> None:
    page = open_page(compared)
    identity = page.locator("#blind").get_attribute("data-comparison")
    for kept in ("[", "7", json.dumps({"0": {"order": [0, 1, 1], "choice": 0}, "1": None, "99": {"order": [0, 1, 2]}})):
        page.evaluate("([key, kept]) => localStorage.setItem(key, kept)", [f"ether compare {identity}", kept])
        page.reload()
        assert "0 of 8 rows judged" in page.locator("#blind [role=status]").inner_text()


def test_without_scripts_names_and_pictures_are_there_and_blind_mode_is_not(compared: Path, open_page: Opener) -> None:
    page = open_page(compared, scripts=False)
    assert page.locator("#blind").is_hidden()
    assert page.locator("#compared img").count() == 4 * len(PROMPTS)
    assert page.locator("#compared th[data-column='2']").inner_text() == "cat"


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_it_fits_every_screen(width: int, compared: Path, open_page: Opener) -> None:
    seen = seen_at(open_page, compared, width)
    assert (seen["outside"], seen["broken"], seen["unreached"]) == ([], [], 0)
    assert seen["large"] == width
