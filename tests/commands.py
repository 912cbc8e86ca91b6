"""Every shell command of README and docs, held against the programs that it calls.

    python tests/commands.py                 # all of them, from a checkout
    python tests/commands.py --installed     # those that need no checkout, with whatever ether-diffusion is installed

A command of a block is parsed by its program as it stands, and nothing is done. Of a command within a line, which has
placeholders, the flags must exist. A program that is not known here is a fault, too: nothing is passed over silently.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jsonargparse

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "ether_diffusion/playground/README.md", "docs")
BLOCK = re.compile(r"```(?:bash|sh)\n(?P<block>.*?)```", re.DOTALL)
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`(?P<span>(?:ether|accelerate launch|python) [^`]+)`")
FOREIGN = ("git", "hf", "npm", "tar", "export", ".")
"""Commands of others, which are not looked into."""
VALUE = "1"
"""What stands for a variable of the shell: a number is also a text."""
OURS = ("ether_diffusion", "eval")
"""Packages whose modules are run as programs."""


NEEDED_BY_HAND = ("cosmic_ray",)
"""Packages of programs that are run by hand, in no extra of the project: without them these are not looked into."""


@dataclass(frozen=True)
class Command:
    """A command, and where it stands.

    Attributes:
        page: relative to the checkout.
        words: as a shell splits them.
        whole: whether it can be typed as it is; otherwise it has placeholders.
    """

    page: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


class ParsedError(Exception):
    """A program has come as far as its parser; nothing else of it is to be run."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


def commands(root: Path = ROOT) -> list[Command]:
    """The commands of all pages, in their order, each once for a page."""
    found: dict[Command, None] = {}
    for page in (
        path for name in PAGES for path in ([root / name] if name.endswith(".md") else (root / name).rglob("*.md"))
    ):
        text, name = page.read_text(encoding="utf-8"), page.relative_to(root).as_posix()
        for block in BLOCK.finditer(text):
            for words in split(block["block"]):
                found[Command(name, tuple(words), True)] = None
        for span in SPAN.finditer(FENCE.sub("", text)):
            words = shlex.split(span["span"].replace("\n", " "))
            if len(words) > 1:
                found[Command(name, tuple(words), False)] = None
    return list(found)


def split(block: str) -> Iterator[list[str]]:
    """The commands of a block, apart at ``&&`` and the like, without comments and settings of the environment."""
    text = re.sub(r"\$\([^()]*\)|\$\w+", VALUE, block.replace("\\\n", " "))
    for line in text.splitlines():
        tokens = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        tokens.whitespace_split = True
        words: list[str] = []
        for token in [*tokens, ";"]:
            if token.strip(";&|"):
                words.append(token)
            else:
                yield from _inner(words)
                words = []


def _inner(words: list[str]) -> Iterator[list[str]]:
    """A command, or those that it gives to a shell."""
    words = words[next((number for number, word in enumerate(words) if not re.match(r"\w+=", word)), len(words)) :]
    if words[1:3] == ["bash", "-c"]:
        yield from split(words[3])
    elif words:
        yield words


def fault(command: Command, installed: bool = False) -> str | None:
    """What is wrong with a command; None if nothing is.

    Args:
        command: of :func:`commands`.
        installed: whether only what needs no checkout is looked at.
    """
    try:
        program, arguments = _program(command.words)
        if program is None or (installed and not _is_installed(program)):
            return None
        return _parsed(program, arguments) if command.whole else _unknown(_parser(program), arguments)
    except (LookupError, ValueError) as error:
        return str(error)
    except ModuleNotFoundError as missing:
        if missing.name in NEEDED_BY_HAND:
            return None
        raise


Program = tuple[str, ...]
"""``ether`` and a verb, ``-m`` and a module, or a script of the checkout."""


def _program(words: Sequence[str]) -> tuple[Program | None, list[str]]:
    """What a command runs, and with which arguments; None for what is of others.

    Raises:
        LookupError: a script, an extra or a target of the Makefile does not exist, or the command is not known here.
    """
    match list(words):
        case ["ether", *rest]:
            return _verb(rest)
        case ["accelerate", "launch", *rest]:
            return _launched(rest)
        case ["torchrun", *rest] if "-m" in rest:
            return _program(["accelerate", "launch", *rest[rest.index("-m") :]])
        case ["python", "-m", module, *rest] if module.partition(".")[0] in OURS:
            return ("-m", module), rest
        case ["python", "-m", "pytest", *rest] | ["pytest", *rest]:
            for path in (word.partition("::")[0] for word in rest if "/" in word or word.endswith(".py")):
                _exists(path)
            return None, []
        case ["python", script, *rest] if script.endswith(".py"):
            _exists(script)
            by_place = script.startswith("tests/") and "ArgumentParser" not in (ROOT / script).read_text(
                encoding="utf-8"
            )
            return (None, []) if by_place else ((script,), rest)
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            _all_known("target of make", targets, re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
            return None, []
        case ["pip", *rest]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            named = [extra for word in rest for extra in _extras(word)]
            _all_known("extra", named, extras["optional-dependencies"])
            return None, []
        case ["python", "-c" | "-X", *_] | ["python", "-m", "http.server", *_]:
            return None, []
        case [name, *_] if name in FOREIGN:
            return None, []
    raise LookupError(f"the command {words[0]} is not known here")


def _verb(words: list[str]) -> tuple[Program | None, list[str]]:
    from ether_diffusion.cli.verbs import ETHER, Group

    verb, taken = ETHER, 0
    while isinstance(verb, Group) and taken < len(words) and not words[taken].startswith("-"):
        if words[taken] == "VERB":
            return None, []
        if words[taken] not in verb.verbs:
            raise LookupError(f"no verb {words[taken]}")
        verb, taken = verb.verbs[words[taken]], taken + 1  # type: ignore[assignment]
    if isinstance(verb, Group):
        return None, []  # its help
    return ("ether", *words[:taken]), words[taken:]


def _launched(words: list[str]) -> tuple[Program | None, list[str]]:
    """What ``accelerate launch`` starts; its own flags are parsed by its parser."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    if all(word.startswith("--") or word == "…" for word in words):  # the launcher's flags alone
        _all_known("flag", [word for word in words if word != "…"], list(parser._option_string_actions))
        return None, []
    given = parser.parse_args(words)
    script, rest = given.training_script, given.training_script_args
    if not given.module:
        _exists(script)
        return (script,), rest
    if script == "ether_diffusion.cli":
        return _verb(rest)
    return ("-m", script), rest


def _refuse(message: str) -> None:
    raise ValueError(message)


def _exists(path: str) -> None:
    if not (ROOT / path).exists():
        raise LookupError(f"there is no {path}")


def _all_known(what: str, named: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in named if name not in known]:
        raise LookupError(f"no {what} {', '.join(unknown)}")


def _extras(word: str) -> list[str]:
    found = re.fullmatch(r"(?:\.|ether[-_]diffusion)\[([\w,]+)\]", word)
    return found[1].split(",") if found else []


def _is_installed(program: Program) -> bool:
    return program[0] == "ether" or (program[0] == "-m" and program[1].startswith("ether_diffusion"))


def _parsed(program: Program, arguments: list[str]) -> str | None:
    """What the program's parser says against arguments; None if nothing."""

    def checked(parse: Any) -> Any:
        def parse_args(parser: argparse.ArgumentParser, args: Any = None, *rest: Any, **settings: Any) -> Any:
            parse(parser, args, *rest, **settings)
            raise ParsedError(parser)

        return parse_args

    with contextlib.ExitStack() as stack:
        said = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            stack.enter_context(mock.patch.object(kind, "parse_args", checked(kind.parse_args)))
        try:
            _run(program, arguments)
        except ParsedError as reached:
            return _unknown(reached.parser, arguments)  # abbreviations, which argparse takes
        except SystemExit as ended:
            return f"{said.getvalue()}{ended}"
    return "it ended before its parser was asked"


def _unknown(parser: argparse.ArgumentParser, arguments: list[str]) -> str | None:
    """The flags that a parser does not have by these names."""
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    unknown = [flag for flag in flags if flag not in parser._option_string_actions]
    return f"no flag {', '.join(unknown)}" if unknown else None


def _parser(program: Program) -> argparse.ArgumentParser:
    """The parser of a program."""

    def asked(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise ParsedError(parser)

    with contextlib.ExitStack() as stack:
        for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            stack.enter_context(mock.patch.object(kind, "parse_args", asked))
        try:
            _run(program, [])
        except ParsedError as reached:
            return reached.parser
    raise LookupError(f"{' '.join(program)} asks no parser")


def _run(program: Program, arguments: list[str]) -> None:
    """Run a program as Python would, as far as its parser."""
    words = [program[1] if program[0] == "-m" else program[0], *arguments]
    with mock.patch("sys.argv", words), mock.patch("sys.path", list(sys.path)):
        if program[0] == "ether":
            from ether_diffusion.cli import main

            main([*program[1:], *arguments])
        elif program[0] == "-m":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
                runpy.run_module(program[1], run_name="__main__")
        else:
            sys.path.insert(0, str((ROOT / program[0]).parent))
            runpy.run_path(str(ROOT / program[0]), run_name="__main__")


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder with what the commands name: the checkout's configs and examples, a recipe and arms of one's own."""
    from ether_diffusion.recipes import find_config

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in ("configs", "examples"):
            (folder / each).symlink_to(ROOT / each)
        (folder / "my.yaml").write_bytes(find_config("dreambooth_sd15").read_bytes())
        (folder / "mine.yaml").write_text("arms: {mine: {method: lora}}\n", encoding="utf-8")
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def main() -> None:
    """Check all, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--installed", action="store_true", help="only what needs no checkout")
    installed = parser.parse_args().installed
    faults = []
    with workplace():
        for command in commands():
            if said := fault(command, installed):
                faults.append(f"{command}\n    {said}")
    print("\n".join([*faults, f"{len(commands())} commands, {len(faults)} faults"]))
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
