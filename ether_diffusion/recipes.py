"""The recipes: YAML files of settings that come with the package; ``--config`` takes them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ether_diffusion.config import suggestion
from ether_diffusion.reading import read_yaml


def recipes() -> dict[str, Path]:
    """The file of every recipe by its name, which is the file's without ``.yaml``."""
    package = Path(__file__).parent
    installed = package / "configs"  # where a wheel puts them; a clone has them beside the package
    folder = installed if installed.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(given: str) -> Path:
    """The file that ``given`` is, or the recipe of that name.

    Raises:
        FileNotFoundError: it is neither; the nearest name is offered.
    """
    path = Path(given)
    if path.exists() and not path.is_dir():  # a pipe is a file, too
        return path
    known = recipes()
    if given in known:
        return known[given]
    names = ", ".join(known)
    raise FileNotFoundError(f"there is no config file {given}{suggestion(path.stem, known)}; known by name: {names}")


def training_settings(path: Path) -> dict[str, Any]:
    """The settings of a training that a recipe holds; that of a study has them below ``training``."""
    settings: dict[str, Any] = read_yaml(path) or {}
    return dict(settings.get("training", settings))
