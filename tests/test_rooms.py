"""A room of the package imports only from rooms below it, whether at the top of a file or inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import ether_diffusion

PACKAGE = Path(ether_diffusion.__file__).parent
FLOORS = (
    ("cli",),
    ("demo", "doctor"),
    ("evaluation",),
    ("training",),
    ("runs", "__init__"),  # `import ether_diffusion` is the public face of what is from here on
    ("metrics",),
    ("playground",),
    ("data",),
    ("control", "export", "peft_tuner"),
    ("pipelines",),
    ("families",),
    ("core",),
    (
        *("page", "arguments", "files", "reading", "images", "config", "registry", "recipes", "private", "ranges"),
        *("logs", "bars", "placeholder", "terminal", "first_imports"),
    ),
)
"""From the top down; rooms of one floor may use each other."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ALLOWED: dict[tuple[str, str], str] = {}
"""Imports that go up all the same: (file, module) and the reason."""


def imported(source: str) -> Iterator[str]:
    """The modules of this package that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            name = node.module or ""
            names = [f"{name}.{alias.name}" for alias in node.names] if name == "ether_diffusion" else [name]
        yield from (name for name in names if name.split(".")[0] == "ether_diffusion")


def room_of(module: str) -> str:
    """The room of a module; a name of the package itself, such as ``attach``, comes from its ``__init__``."""
    room = [*module.split("."), "__init__"][1]
    return room if room in FLOOR else "__init__"


def climbs(file: str, source: str) -> list[str]:
    """What a file imports from above its own room."""
    own = FLOOR[Path(file).parts[0].removesuffix(".py")]
    return [module for module in imported(source) if FLOOR[room_of(module)] < own and (file, module) not in ALLOWED]


def test_every_room_has_its_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms <= set(FLOOR)


def test_rooms_import_from_below() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        if up := climbs(file, path.read_text(encoding="utf-8")):
            found[file] = up
    assert found == {}


def test_an_import_from_above_is_found_wherever_it_stands() -> None:
    inside = "def f():\n    from ether_diffusion.training import config\n    import ether_diffusion.runs.folder"
    assert climbs("runs/x.py", inside) == ["ether_diffusion.training"]
    assert climbs("core/x.py", inside) == ["ether_diffusion.training", "ether_diffusion.runs.folder"]
    assert climbs("training/x.py", inside) == []
    assert climbs("pipelines/x.py", "import ether_diffusion as ether") == ["ether_diffusion"]
    assert climbs("data/x.py", "from ether_diffusion import control, runs") == ["ether_diffusion.runs"]
