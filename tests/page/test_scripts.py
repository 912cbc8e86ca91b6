"""The extras of pages in a real browser, by mouse and by keys alone; without scripts there is everything but them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from page.chromium import Opener, needs_chromium
from page.serving import serving
from PIL import Image

from ether_diffusion.files import write_text
from ether_diffusion.runs.report import write_report
from ether_diffusion.runs.watch import ReportServer

pytestmark = needs_chromium

PROMPTS = [f"a qwe dog {place}" for place in ("at home", "in snow", "in rain", "on sand", "in a car", "by night")]
STEPS = (0, 100, 200)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose samples are red at step 0, green at step 100, blue at step 200."""
    folder = tmp_path / "dog"
    for step, colour in zip(STEPS, (RED, GREEN, BLUE), strict=True):
        (folder / "samples" / f"step-{step:06d}").mkdir(parents=True)
        for number in range(len(PROMPTS)):
            Image.new("RGB", (64, 64), colour).save(folder / "samples" / f"step-{step:06d}" / f"{number:02d}.png")
    prompts = [{"file": f"{n:02d}.png", "prompt": prompt, "seed": n} for n, prompt in enumerate(PROMPTS)]
    (folder / "samples" / "prompts.json").write_text(json.dumps(prompts))
    config = {"pretrained_model_name_or_path": "playground", "method": "ether_plus", "max_train_steps": 300}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text(json.dumps({"step": 200, "status": "running"}))
    return folder


def test_keys_alone_enlarge_a_picture_and_go_on_to_the_next(run: Path, open_page: Opener) -> None:
    page = open_page(write_report(run))
    table = page.locator("#samples-grid")
    first, second = table.locator("img").nth(0), table.locator("img").nth(1)

    def widths() -> list[float]:
        return [each.evaluate("each => each.getBoundingClientRect().width") for each in (first, second)]

    small = widths()
    table.locator("input").first.focus()
    page.keyboard.press("Enter")
    assert widths() == [1400, small[1]]
    page.keyboard.press("ArrowRight")
    assert widths() == [small[0], 1400]
    assert page.evaluate("document.activeElement.ariaLabel") == "Enlarge Step 100: a qwe dog at home, seed 0"
    page.keyboard.press("ArrowLeft")
    assert widths() == [1400, small[1]]
    page.keyboard.press("Escape")
    assert widths() == small
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    assert widths() == small
    assert page.evaluate("document.activeElement.ariaLabel") == "Enlarge Step 100: a qwe dog at home, seed 0"
    first.click()
    assert widths() == [1400, small[1]]
    first.click()
    assert widths() == small


def test_the_slider_shows_two_steps_of_one_prompt(run: Path, open_page: Opener, tmp_path: Path) -> None:
    page = open_page(write_report(run))
    pair, border = page.locator(".pair"), page.get_by_label("Border between the two pictures")
    pair.scroll_into_view_if_needed()

    def colours() -> list[tuple[int, ...]]:
        """At a tenth, four and six tenths, and nine tenths of the width."""
        path = tmp_path / "pair.png"
        pair.screenshot(path=path)
        seen = Image.open(path).convert("RGB")
        points = [(int(share * seen.width), seen.height // 2) for share in (0.1, 0.4, 0.6, 0.9)]
        return [tuple(255 if part > 128 else 0 for part in seen.getpixel(point)) for point in points]  # type: ignore[union-attr]

    assert colours() == [RED, RED, BLUE, BLUE]
    assert pair.locator("img").nth(0).get_attribute("alt") == "Base model: a qwe dog at home, seed 0"
    border.focus()
    page.keyboard.press("Home")
    assert colours() == [BLUE] * 4
    page.keyboard.press("End")
    assert colours() == [RED] * 4
    box = pair.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    assert colours() == [RED, BLUE, BLUE, BLUE]
    assert border.get_attribute("aria-valuetext") == "25 % of the picture: base"
    page.get_by_label("Right").select_option("100")
    assert colours() == [RED, GREEN, GREEN, GREEN]
    page.get_by_label("Prompt and seed").select_option("a qwe dog in snow seed 1")
    assert pair.locator("img").nth(1).get_attribute("alt") == "Step 100: a qwe dog in snow, seed 1"


def test_the_filter_shows_the_rows_that_have_all_words(run: Path, open_page: Opener) -> None:
    page = open_page(write_report(run))
    field = page.get_by_label("Filter: Samples by prompt and step")
    rows = page.locator("#samples-grid tbody:visible")
    field.fill("IN dog")
    assert [text.split("seed")[0].strip() for text in rows.locator("th").all_inner_texts()] == [
        prompt for prompt in PROMPTS if " in " in prompt
    ]
    assert page.get_by_role("status").filter(has_text="3 of 6 rows").count() == 1
    field.fill("")
    assert rows.count() == len(PROMPTS)


def test_without_scripts_there_is_all_but_the_extras(run: Path, open_page: Opener) -> None:
    page = open_page(write_report(run), scripts=False)
    assert page.locator("#samples-grid img").count() == len(STEPS) * len(PROMPTS)
    assert page.locator(".slider").is_hidden()
    assert page.locator("[type=search]").count() == 0
    page.locator("#samples-grid input").first.press("Space")
    assert page.locator("#samples-grid img").first.evaluate("each => each.getBoundingClientRect().width") == 1400


@pytest.fixture
def server(run: Path) -> Iterator[ReportServer]:
    with serving(run) as server:
        yield server


def grow(run: Path, step: int) -> None:
    """Write what a training writes when it comes to a step with samples."""
    folder = run / "samples" / f"step-{step:06d}"
    folder.mkdir()
    for number in range(len(PROMPTS)):
        Image.new("RGB", (64, 64), BLUE).save(folder / f"{number:02d}.png")
    write_text(run / "provenance.json", json.dumps({"step": step, "status": "running"}))


def test_a_watched_page_follows_a_run_that_grows(run: Path, server: ReportServer, open_page: Opener) -> None:
    page = open_page(server.address)
    assert "200 of 300 steps" in page.locator("header").inner_text()
    grow(run, 250)
    page.locator("header").get_by_text("250 of 300 steps").wait_for(timeout=30_000)
    assert page.locator("#samples-grid thead").inner_text().split() == ["base", "100", "200", "250"]


def test_a_watched_page_waits_while_a_picture_is_enlarged(run: Path, server: ReportServer, open_page: Opener) -> None:
    page = open_page(server.address)
    page.locator("#samples-grid input").first.press("Enter")
    grow(run, 250)
    page.get_by_text("The run has gone on").wait_for(timeout=30_000)
    assert "200 of 300 steps" in page.locator("header").inner_text()
    page.keyboard.press("Escape")
    page.locator("header").get_by_text("250 of 300 steps").wait_for(timeout=30_000)


def test_a_watched_page_without_scripts_asks_again(server: ReportServer, open_page: Opener) -> None:
    page = open_page(server.address, scripts=False)
    assert page.locator("noscript meta[http-equiv=refresh], meta[http-equiv=refresh]").count() == 1
