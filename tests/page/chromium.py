"""A real browser for the tests of pages: it opens a file without a network and gives its DOM."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def found_by(page: Path, profile: Path) -> Any:
    """What a script of the page left in the title, as JSON, after four seconds of the browser's own time."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=4000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    return json.loads(unescape(title[1]))


PROBE = """<!DOCTYPE html><title>?</title><body><script>
const page = %s, widths = %s, found = {};
const broken = root => {
  const walker = root.createTreeWalker(root.body, NodeFilter.SHOW_TEXT), bad = [];
  for (let node; node = walker.nextNode();) {
    if (["STYLE", "SCRIPT", "CODE"].includes(node.parentElement.tagName)) continue;
    for (const match of node.data.matchAll(/\\d[\\d.,]*\\d/g)) {
      const range = root.createRange();
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      if (new Set([...range.getClientRects()].map(rect => Math.round(rect.top))).size > 1) bad.push(match[0]);
    }
  }
  return bad;
};
const look = width => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 844px; border: 0`;
  frame.srcdoc = page;
  frame.onload = () => {
    const root = frame.contentDocument, view = frame.contentWindow;
    for (const details of root.querySelectorAll("details")) details.open = true;
    const sticks = each => !each.closest(".scroll, svg") && each.getBoundingClientRect().right > width + 1;
    const name = each => `${each.tagName}.${each.className}`;
    const outside = [...root.querySelectorAll("body *")].filter(sticks).map(name);
    const input = root.querySelector(".enlarge input"), image = root.querySelector(".enlarge img");
    const small = image.getBoundingClientRect().width;
    input.focus();
    const outline = view.getComputedStyle(image).outlineStyle;
    input.click();
    const large = image.getBoundingClientRect().width;
    input.click();
    const again = image.getBoundingClientRect().width;
    const unreached = [...root.querySelectorAll(".scroll")].filter(each => each.tabIndex !== 0).length;
    found[width] = {outside, broken: broken(root), small, large, again, outline, unreached};
    frame.remove();
    done();
  };
  document.body.append(frame);
});
(async () => { for (const width of widths) await look(width); document.title = JSON.stringify(found); })();
</script></body>"""


def seen_at(html: str, widths: list[int], folder: Path) -> dict[str, Any]:
    """What a page is like in frames of some widths: what sticks out, numbers that are broken over two lines, pictures.

    Args:
        html: the page, without scripts of its own.
        widths: in CSS pixels.
        folder: for the probe and the browser's profile.
    """
    probe = folder / "probe.html"
    text = json.dumps(html.replace('loading="lazy"', "")).replace("</", "<\\/")
    probe.write_text(PROBE % (text, json.dumps(widths)), encoding="utf-8")
    found: dict[str, Any] = found_by(probe, folder / "profile")
    return found
