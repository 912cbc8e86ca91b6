"""From the words of the command line to the program that they name, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pkgutil import resolve_name

from ether_diffusion.cli.verbs import ETHER, Group, Program
from ether_diffusion.config import suggestion
from ether_diffusion.first_imports import ended_by_ctrl_c
from ether_diffusion.logs import silence_libraries
from ether_diffusion.terminal import may_close

BAD_INPUT = 2
"""Exit status of a mistake that the user can mend; argparse's own."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command ``ether``.

    Args:
        arguments: the words after ``ether``; those of the process by default.

    Raises:
        SystemExit: 2 after one line on the standard error for bad input, 130 after Ctrl-C; otherwise what the program
            ends with.
    """
    with _ended_well():
        _run(ETHER, ETHER.name, list(sys.argv[1:] if arguments is None else arguments))


def run_script(*words: str) -> None:
    """A script of the repository: the program of a verb, with the words of the process and under the script's name.

    Args:
        words: the verb, such as "study", "coverage".

    Raises:
        SystemExit: as :func:`main`.
    """
    verb: Program | Group = ETHER
    for word in words:
        verb = verb.verbs[word] if isinstance(verb, Group) else verb
    if not isinstance(verb, Program):
        raise ValueError(f"{' '.join(words)} is no program")
    with _ended_well():
        _load(verb.target)(sys.argv[1:])


@contextmanager
def _ended_well() -> Iterator[None]:
    """Run a program without messages that mean nothing; after Ctrl-C and bad input end with one line."""
    silence_libraries()
    try:
        with may_close():
            yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit as ended:
        if not isinstance(ended.code, str):
            raise
        print(ended.code, file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None


def _run(verb: Program | Group, command: str, arguments: list[str]) -> None:
    """Run the verb that ``command`` names with the words after it."""
    if isinstance(verb, Program):
        with _command_line(command, arguments):
            _load(verb.target)(arguments)
        return
    word, *rest = arguments or ["--help"]
    if word in ("-h", "--help"):
        _show(overview(verb, command))
    elif verb is ETHER and word == "--version":
        _show(f"{command} {version('ether-diffusion')}")
    elif word in verb.verbs:
        _run(verb.verbs[word], f"{command} {word}", rest)
    else:
        offer = suggestion(word, verb.verbs)
        raise SystemExit(f'{command}: there is no verb "{word}"{offer}; "{command} --help" lists all')


def _show(text: str) -> None:
    """Print, to whom still reads: ``ether --help | head`` ends without a traceback."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends


def _load(target: str) -> Callable[[list[str]], object]:
    """Import a program."""
    with ended_by_ctrl_c():
        return resolve_name(target)


@contextmanager
def _command_line(command: str, arguments: list[str]) -> Iterator[None]:
    """Set ``sys.argv`` for a program: argument parsers take the program's name from it."""
    before = sys.argv
    sys.argv = [command, *arguments]
    try:
        yield
    finally:
        sys.argv = before


def overview(group: Group, command: str) -> str:
    """The help of a verb with verbs below it."""
    width = max(map(len, group.verbs))
    lines = [f"usage: {command} VERB …", "", group.help]
    for heading, verbs in group.sections.items():
        lines += ["", f"{heading}:", *(f"  {verb.name:{width}}  {verb.help}" for verb in verbs)]
    lines += ["", f'"{command} VERB --help" shows the settings of a verb.']
    return "\n".join(lines)
