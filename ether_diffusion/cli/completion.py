"""``ether completion SHELL``: a script that completes verbs, settings, their choices and recipes in a shell.

ether completion bash > ~/.local/share/bash-completion/completions/ether
ether completion zsh > ~/.zfunc/_ether        # with fpath+=~/.zfunc before compinit in ~/.zshrc
ether completion tcsh > ~/.ether.tcsh         # with source ~/.ether.tcsh in ~/.tcshrc

It needs the extra "completion". The settings of the verbs that train are completed, of the others the verbs and files.
Write it anew after an upgrade.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pkgutil import resolve_name

from ether_diffusion.arguments import Parser
from ether_diffusion.cli.verbs import ETHER, Group, Program
from ether_diffusion.recipes import recipes
from ether_diffusion.training.help import parser_of

SHELLS = ("bash", "zsh", "tcsh")
RECIPES = {"bash": "_ether_recipes", "zsh": "_files", "tcsh": "f"}
"""How the value of ``--config`` is completed: in bash by names and files, elsewhere by files."""
PREAMBLE = '_ether_recipes() {{\n  compgen -W "{names}" -- "$1"\n  compgen -f -- "$1"\n}}'
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the script for the shell that the command line names.

    Raises:
        SystemExit: there is no such shell, or shtab is not installed.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=SHELLS, help="for which the script is")
    given = parser.parse_args(arguments)
    try:
        print(script(given.shell))
    except ImportError as error:
        parser.error(str(error))


def script(shell: str) -> str:
    """The completion script of the command.

    Args:
        shell: bash, zsh or tcsh.

    Raises:
        ImportError: shtab is not installed; the message says how to install it.
    """
    try:
        import shtab
    except ImportError:
        raise ImportError("completion needs shtab: pip install 'ether-diffusion[completion]'") from None
    parser = argparse.ArgumentParser(ETHER.name)
    parser.add_argument("--version", action="store_true")
    _add(parser, ETHER)
    preamble = {"bash": PREAMBLE.format(names=" ".join(recipes()))}
    written: str = shtab.complete(parser, shell, preamble=preamble)
    return written


def _add(parser: argparse.ArgumentParser, group: Group) -> None:
    """Give a parser the verbs of a group."""
    below = parser.add_subparsers()
    for verb in group.verbs.values():
        if isinstance(verb, Group):
            _add(below.add_parser(verb.name, help=verb.help), verb)
        elif verb.settings is not None:
            known = _completed(verb, f"{parser.prog} {verb.name}")
            below.add_parser(verb.name, help=verb.help, parents=[known], add_help=False)
        else:
            other = below.add_parser(verb.name, help=verb.help)
            other.add_argument("file", nargs="*").complete = FILES  # type: ignore[attr-defined]


def _completed(verb: Program, prog: str) -> argparse.ArgumentParser:
    """The flags of a program with a config, with what completes their values."""
    known = parser_of(resolve_name(str(verb.settings)), prog)
    for action in known._actions:
        if action.dest == "config":
            action.complete = RECIPES  # type: ignore[attr-defined]
        elif not action.choices and action.nargs != 0:
            action.complete = FILES  # type: ignore[attr-defined]
    return known
