"""From a template to a page that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ether_diffusion.page.palette import DARK, LIGHT, THEME

SCRIPTS = Path(__file__).parent / "scripts"


def render(template: Path, filters: Mapping[str, Callable[..., Any]], **values: object) -> str:
    """Fill a template, which may extend ``page.html.jinja`` and import from ``parts.html.jinja``.

    A template that sets ``scripts`` has these programs of the folder ``scripts`` in its page. The page names their
    hashes, and a browser runs no others.

    Args:
        template: the template's file.
        filters: by the names under which it uses them.
        values: what it shows; everything that it names must be there.

    Raises:
        jinja2.UndefinedError: the template names something that is not among the values.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({"script": script, "script_hash": script_hash, **filters})
    environment.globals.update(palette=list(zip(LIGHT, DARK, strict=True)), theme=THEME)
    return environment.get_template(template.name).render(**values)


def script(name: str) -> Markup:
    """The text of a program of the folder ``scripts``, as it stands between its tags."""
    return Markup((SCRIPTS / f"{name}.js").read_text(encoding="utf-8"))


def script_hash(name: str) -> str:
    """How a Content-Security-Policy names the program: ``sha256-…``."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script(name).encode()).digest()).decode()}"
