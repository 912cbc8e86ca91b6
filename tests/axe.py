"""Pages under axe-core in Chromium, at three widths, in light and dark: what users of aids would stumble over.

It is a program beside the suite, since axe-core is a package of npm and no dependency of this one:

    python benchmarks/pages.py --keep pages                  # a page of every kind
    npm install --prefix axe axe-core
    python tests/axe.py axe/node_modules/axe-core/axe.min.js pages/*.html --screens screens

All details are opened first. The program ends with 1 where a rule of WCAG 2.2 A or AA, or of axe's best practices,
finds a serious or critical fault; others are printed only. ``--screens`` saves what was seen as PNGs, to be looked at.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from page.chromium import launch
from playwright.sync_api import Browser, sync_playwright

WIDTHS = (390, 768, 1400)
SCHEMES = ("light", "dark")
SEEN = 4000
"""Pixels of a page's height that a screenshot shows."""
SERIOUS = ("serious", "critical")
OPEN = "for (const each of document.querySelectorAll('details')) each.open = true"


def faults(browser: Browser, axe: str, path: Path, width: int, scheme: str, screens: Path | None) -> list[str]:
    """What axe finds at one width in one theme, a line for each rule; a comparison is seen blind, too."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    found = []
    for state in ("", "#blind") if "comparison" in path.stem else ("",):
        page.goto("about:blank")
        page.goto(f"{path.resolve().as_uri()}{state}")
        if screens is not None:
            name = f"{path.stem}{state.replace('#', '-')}-{width}-{scheme}.png"
            height = min(SEEN, page.evaluate("document.documentElement.scrollHeight"))
            shown = {"x": 0, "y": 0, "width": width, "height": height}
            page.screenshot(path=screens / name, full_page=True, clip=shown)  # type: ignore[arg-type]
        page.evaluate(OPEN)
        page.evaluate(axe)
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        found += [
            f"{rule['impact']}: {rule['id']}: {rule['help']} ({len(rule['nodes'])}): {rule['nodes'][0]['html'][:200]}"
            for rule in result["violations"]
        ]
    context.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axe", type=Path, help="axe.min.js of the package axe-core")
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--screens", type=Path, help="folder for screenshots")
    given = parser.parse_args()
    axe = given.axe.read_text(encoding="utf-8")
    if given.screens is not None:
        given.screens.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with sync_playwright() as playwright:
        browser = launch(playwright)
        for path in given.pages:
            for width in WIDTHS:
                for scheme in SCHEMES:
                    for line in faults(browser, axe, path, width, scheme, given.screens):
                        print(f"{path.name} {width} {scheme}: {line}")
                        counts[line.split(":")[0]] += 1
        browser.close()
    print(f"{len(given.pages)} pages, {len(WIDTHS)} widths, {len(SCHEMES)} themes: {dict(counts) or 'no faults'}")
    sys.exit(any(counts[impact] for impact in SERIOUS))


if __name__ == "__main__":
    main()
