"""Links of a Markdown text, for places where relative ones lead nowhere: the metadata of a wheel, the site."""

from __future__ import annotations

import re
from collections.abc import Callable

FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
ELSEWHERE = ("http://", "https://", "mailto:", "#")

Places = Callable[[str, bool], str | None]
"""From a relative link, and whether it is a picture, to where it leads; None where it leads nowhere."""


def relinked(text: str, place: Places) -> str:
    """The text with its relative links led elsewhere; code blocks stay as they are.

    Args:
        text: in Markdown.
        place: where a relative link leads. Of a link that leads nowhere the text is kept, of a picture nothing.
    """

    def link(found: re.Match[str]) -> str:
        picture, said, target = found.group("picture", "text", "target")
        if target.startswith(ELSEWHERE):
            return found.group()
        led = place(target, bool(picture))
        if led is None:
            return "" if picture else said
        return f"{picture}[{said}]({led})"

    parts = FENCE.split(text)
    return "".join(part if number % 2 else LINK.sub(link, part) for number, part in enumerate(parts))


def at_repository(address: str | None) -> Places:
    """Places in a repository on the web, from its top folder.

    Args:
        address: of the repository, as ``https://host/owner/name``; without one relative links lead nowhere.
    """

    def place(target: str, picture: bool) -> str | None:
        return None if address is None else f"{address}/{'raw' if picture else 'blob'}/main/{target}"

    return place
