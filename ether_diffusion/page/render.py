"""From a template to a page that asks nothing of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ether_diffusion.page.palette import DARK, LIGHT


def render(template: Path, filters: Mapping[str, Callable[..., Any]], **values: object) -> str:
    """Fill a template, which may extend ``page.html.jinja`` and import from ``parts.html.jinja``.

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
    environment.filters.update(filters)
    environment.globals["palette"] = list(zip(LIGHT, DARK, strict=True))
    return environment.get_template(template.name).render(**values)
