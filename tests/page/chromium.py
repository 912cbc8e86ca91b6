"""A real browser for the tests of pages: Chromium, driven by playwright, at any size, with and without scripts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None, reason="no Chromium, or no playwright, on this machine"
)
Opener = Callable[..., "Page"]

BROKEN = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), bad = [];
  for (let node; node = walker.nextNode();) {
    if (["STYLE", "SCRIPT", "CODE"].includes(node.parentElement.tagName)) continue;
    for (const match of node.data.matchAll(/\\d[\\d.,]*\\d/g)) {
      const range = document.createRange();
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      if (new Set([...range.getClientRects()].map(rect => Math.round(rect.top))).size > 1) bad.push(match[0]);
    }
  }
  return bad;
}"""
"""The numbers of a page that stand on two lines."""
OUTSIDE = """() => [...document.querySelectorAll("body *")]
  .filter(each => !each.closest(".scroll, svg") && each.getBoundingClientRect().right > innerWidth + 1)
  .map(each => `${each.tagName}.${each.className}`)"""
"""The elements that stick out of the window, apart from those in a region that scrolls."""


def launch(playwright: Any) -> Browser:
    """Chromium without a window."""
    browser: Browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    return browser


@pytest.fixture
def open_page() -> Iterator[Opener]:
    """``open_page(file or address, width=1400, scheme="light", scripts=True)``: a page in a fresh profile.

    A test fails where a page asks anything of another machine, has an error in a script, or shows a dialogue.
    """
    from playwright.sync_api import sync_playwright

    faults: list[str] = []
    with sync_playwright() as playwright:
        browser = launch(playwright)

        def open_it(
            place: Path | str,
            width: int = 1400,
            scheme: Literal["light", "dark"] = "light",
            scripts: bool = True,
        ) -> Page:
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
            )
            page = context.new_page()
            allowed = ("file:", "data:", "blob:", "http://127.0.0.1:")
            page.on("request", lambda asked: asked.url.startswith(allowed) or faults.append(asked.url))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
            page.goto(place if isinstance(place, str) else place.as_uri())
            return page

        yield open_it
        with suppress(Exception):  # a browser that a test has closed already
            browser.close()
    assert faults == []


def seen_at(open_page: Opener, place: Path, width: int) -> dict[str, Any]:
    """What a page is like at a width: what sticks out, numbers that are broken over two lines, the first picture."""
    page = open_page(place, width)
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    box, image = page.locator(".enlarge input").first, page.locator(".enlarge img").first

    def size() -> float:
        found: float = image.evaluate("each => each.getBoundingClientRect().width")
        return found

    found = {
        "outside": page.evaluate(OUTSIDE),
        "broken": page.evaluate(BROKEN),
        "unreached": page.locator(".scroll:not([tabindex='0'])").count(),
        "small": size(),
    }
    box.focus()
    found["outline"] = image.evaluate("each => getComputedStyle(each).outlineStyle")
    page.keyboard.press("Space")
    found["large"] = size()
    page.keyboard.press("Space")
    found["again"] = size()
    page.context.close()
    return found
