"""What the site adds to the pages of this folder, for MkDocs: pages from elsewhere, links, and what is made from code.

- README, CONTRIBUTING, CHANGELOG and the playground's page become pages where they are; nothing is copied.
- Links are led to the page of the site; those to sources to the repository's address in pyproject.toml, if it is there.
- A page of the reference for every room of the package, and the list of errors.
"""

from __future__ import annotations

import posixpath
import re
import sys
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

from errors import as_markdown, messages
from links import at_repository, relinked

ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "ether_diffusion/playground/README.md": "playground.md",
}
"""Pages of the site that do not lie in docs/, by their path in the repository."""
PICTURES = (".png", ".webp", ".jpg")
ERRORS = "<!-- errors -->"
"""Where the list of errors goes."""
LOADED = re.compile(
    r"<(?:script|img|iframe|link rel=.?stylesheet)[^>]*? (?:src|href)=.?(?P<address>(?:https?:)?//[^\s>\"']+)"
)
"""A script, a picture or a style of elsewhere."""
ROOMS = "reference/rooms"
SOURCES = at_repository(
    tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"].get("Repository")
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages of the rooms under the reference."""
    (reference,) = (entry["API reference"] for entry in config.nav or [] if "API reference" in entry)
    reference.append({"Rooms": [f"{ROOMS}/{room}.md" for room in rooms()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere with their pictures, and those of the rooms."""
    for path, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
        for picture in _pictures_beside(ROOT / path):
            files.append(File.generated(config, _asset(picture), abs_src_path=str(ROOT / picture)))
    for room in rooms():
        text = f"# ether_diffusion.{room}\n\n::: ether_diffusion.{room}\n"
        files.append(File.generated(config, f"{ROOMS}/{room}.md", content=text))
    return files


def rooms() -> list[str]:
    """The rooms of the package, and its modules that are in none."""
    package = ROOT / "ether_diffusion"
    folders = [path.parent.name for path in package.glob("*/__init__.py")]
    return sorted([*folders, *(path.stem for path in package.glob("*.py") if path.stem != "__init__")])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the page's links to pages of the site, and put the list of errors where it belongs."""
    sources = {page: path for path, page in ELSEWHERE.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri) or "."

    def place(target: str, picture: bool) -> str | None:
        path, mark, anchor = target.partition("#")
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / wanted).exists():
            return target  # MkDocs says that it leads nowhere
        found = ELSEWHERE.get(wanted, wanted.removeprefix("docs/") if wanted.startswith("docs/") else _asset(wanted))
        if files.get_file_from_path(found) is None:
            return SOURCES(wanted, picture)
        return posixpath.relpath(found, here) + mark + anchor

    return relinked(markdown, place).replace(ERRORS, as_markdown(messages()) if ERRORS in markdown else "")


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """See that a page loads nothing from elsewhere.

    Raises:
        PluginError: it does.
    """
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads {found['address']}: the site must be readable without a network")
    return output


def _asset(path: str) -> str:
    """Where the site has a picture that does not lie in docs/."""
    return f"pictures/from/{path}"


def _pictures_beside(page: Path) -> list[str]:
    """Pictures below the folder of a page of the package, by their paths in the repository."""
    if page.parent == ROOT:
        return []
    return [path.relative_to(ROOT).as_posix() for path in sorted(page.parent.rglob("*")) if path.suffix in PICTURES]
