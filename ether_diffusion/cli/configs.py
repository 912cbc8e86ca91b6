"""``ether config``: the recipes of the package, to look at and to copy.

ether config list                          # their names, the base of each, and what it is for
ether config show dreambooth_sd15          # what --config dreambooth_sd15 reads
ether config copy dreambooth_sd15 my.yaml  # a file of your own, to change and to give as --config my.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from ether_diffusion.arguments import Parser
from ether_diffusion.files import new_path
from ether_diffusion.recipes import find_config, recipes, training_settings

NAME_HELP = "name of a recipe, or a file"
PURPOSE = 100
"""Characters of what a recipe is for."""


def list_main(arguments: Sequence[str] | None = None) -> None:
    """Print every recipe with its base and what it is for."""
    _parser().parse_args(arguments)
    base = "pretrained_model_name_or_path"
    rows = [(name, str(training_settings(path)[base]), _purpose(path)) for name, path in recipes().items()]
    names, bases = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, base, comment in rows:
        print(f"{name:{names}}  {base:{bases}}  {comment}")


def show_main(arguments: Sequence[str] | None = None) -> None:
    """Print a recipe as it is.

    Raises:
        SystemExit: there is no recipe of that name; the nearest is offered.
    """
    parser = _parser()
    parser.add_argument("name", metavar="NAME", help=NAME_HELP)
    sys.stdout.write(_found(parser, parser.parse_args(arguments).name).read_text(encoding="utf-8"))


def copy_main(arguments: Sequence[str] | None = None) -> None:
    """Copy a recipe to a new file.

    Raises:
        SystemExit: there is no recipe of that name, or the file is there already or cannot be written.
    """
    parser = _parser()
    parser.add_argument("name", metavar="NAME", help=NAME_HELP)
    parser.add_argument("file", metavar="FILE", type=Path, help="new file, or the folder for a file of the same name")
    given = parser.parse_args(arguments)
    source = _found(parser, given.name)
    target: Path = given.file / source.name if given.file.is_dir() else given.file
    try:
        with new_path(target) as temporary:
            temporary.write_bytes(source.read_bytes())
    except OSError as error:
        parser.error(str(error))
    print(f"{target}: change it, and give it as --config {target}")


def _parser() -> Parser:
    return Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def _found(parser: Parser, name: str) -> Path:
    try:
        return find_config(name)
    except FileNotFoundError as error:
        parser.error(str(error))


def _purpose(path: Path) -> str:
    """The first paragraph of a recipe's comment, or as much of it as a line holds."""
    paragraph = path.read_text(encoding="utf-8").partition("\n#\n")[0].splitlines()
    lines = [line.lstrip("# ") for line in paragraph if line.startswith("#")]
    return shorten(" ".join(lines), PURPOSE, placeholder=" …")
