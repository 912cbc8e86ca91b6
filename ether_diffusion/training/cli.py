"""The command line of a program: a YAML file, every field a flag, the flag over the file."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from ether_diffusion.config import suggestion
from ether_diffusion.reading import read_yaml
from ether_diffusion.recipes import find_config
from ether_diffusion.training import help

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
"""Types in a message."""
MESSAGE_LIMIT = 2000
"""Characters of an error; a setting may have any length."""

BASE = "pretrained_model_name_or_path"
"""The setting that names a base."""

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound="DataclassInstance")


def parse_config(config_class: type[Config], arguments: Sequence[str] | None = None) -> Config:
    """Read ``--config FILE.yaml`` and flags into a config; a mistake ends the program with one clear line.

    A flag that takes a list may be given several times; one for a yes or no may stand alone (``--random_flip``)
    or have a value (``--random_flip false``). ``--help`` prints the settings that most people need, ``--help=all`` all.

    Args:
        config_class: the dataclass of the program's settings.
        arguments: the command line; that of the process by default.

    Raises:
        SystemExit: an unknown flag, key or config (the nearest one is offered), a value of the wrong type, a missing
            setting, or ``--help``.
    """
    prog, given = Path(sys.argv[0]).name, list(sys.argv[1:] if arguments is None else arguments)
    if (flag := help.asked_for(given)) is not None:
        if flag not in (*help.FLAGS, help.EVERYTHING):
            raise SystemExit(f"{prog}: {flag} shows nothing: --help shows the common settings, {help.EVERYTHING} all")
        print(help.help_of(config_class, prog, flag == help.EVERYTHING), end="")
        raise SystemExit(0)
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class, as_group=False)
    names = [field.name for field in dataclasses.fields(config_class)]
    try:
        spelt = _files_first(_gather_lists(_spell_out_switches(given, config_class), config_class))
        values = parser.parse_args(spelt)
        config = config_class(**{name: values[name] for name in names})
        _warn_of_another_base(config, spelt)
        return config
    except (ArgumentError, FileNotFoundError, ValueError, TypeError) as error:
        message = _in_words(" ".join(str(error).split()))
        said = message if len(message) <= MESSAGE_LIMIT else f"{message[:MESSAGE_LIMIT]}…"
        raise SystemExit(f"{parser.prog}: {said}{_hint(message, names)}") from None


def _spell_out_switches(arguments: list[str], config_class: type[DataclassInstance]) -> list[str]:
    """Turn a bare ``--random_flip`` into ``--random_flip=true``."""
    switches = {f"--{field.name}" for field in dataclasses.fields(config_class) if field.type == "bool"}
    following = [*arguments[1:], "--"]
    return [
        f"{argument}=true" if argument in switches and after.startswith("--") else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def _gather_lists(arguments: list[str], config_class: type[DataclassInstance]) -> list[str]:
    """Make one list of a repeated flag that takes a list: ``--validation_prompt a --validation_prompt b``."""
    lists = [f"--{field.name}" for field in dataclasses.fields(config_class) if str(field.type).startswith("list[")]
    joined = tuple(f"{flag}=" for flag in lists)
    split = [argument.split("=", 1) if argument.startswith(joined) else [argument] for argument in arguments]
    arguments = [part for parts in split for part in parts]
    for flag in (flag for flag in lists if arguments.count(flag) > 1):
        places = [i for i, argument in enumerate(arguments) if argument == flag]
        values = [arguments[i + 1] for i in places if i + 1 < len(arguments)]
        dropped = {i for place in places for i in (place, place + 1)}
        arguments = [argument for i, argument in enumerate(arguments) if i not in dropped]
        arguments += [f"{flag}={json.dumps(values)}"]
    return arguments


def _files_first(arguments: list[str]) -> list[str]:
    """Put ``--config FILE`` before the flags: the last one wins, and a flag goes over the file wherever it stands.

    Raises:
        FileNotFoundError: a config is neither a file nor the name of a recipe.
    """
    files: list[str] = []
    flags: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--config":
            flags.append(argument)
        elif (given := value if equals else next(rest, None)) is None:
            files.append(argument)  # the parser says that its value is missing
        else:
            files.append(f"--config={_config_file(given)}")
    return files + flags


def _warn_of_another_base(config: DataclassInstance, arguments: Sequence[str]) -> None:
    """Name the values that a recipe has for its own base, where the command line gives another one."""
    recipe: dict[str, Any] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--config" and Path(value).is_file():
            recipe |= read_yaml(value) or {}
    made_for, base = recipe.get(BASE), getattr(config, BASE, None)
    if made_for is None or base is None or made_for == base:
        return
    flags = {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    kept = [f"{name}={recipe[name]}" for name in getattr(config, "OF_BASE", ()) if name in recipe and name not in flags]
    if kept:
        logger.warning(
            "the recipe is for %s, the base is %s; made for the recipe's base and kept: %s; give values of your "
            "own, or leave the recipe out",
            made_for,
            base,
            ", ".join(kept),
        )


def _config_file(given: str) -> str:
    """The path of a config, which is read once here, so that an error in it names it.

    The parser takes settings themselves, ``seed: 3``, and ``-`` as well; and a pipe, which can be read only once.
    """
    if ":" in given or given == "-":
        return given
    path = find_config(given)
    if path.is_file() and not isinstance(read_yaml(path), dict | None):
        raise ValueError(f"{path} holds no settings: lines such as max_train_steps: 400 are expected")
    return str(path)


def _in_words(message: str) -> str:
    """The parser's error about a value of a wrong type, without the names of Python's types."""
    found = re.search(r'^(.*?)Parser key "([\w.]+)": (.*) (?:Got|Given) value: (.*)$', message)
    kinds = re.findall(r"class '(\w+)'", found[3].split("Given value type")[0]) if found else []
    words = [KINDS[kind] for kind in dict.fromkeys(kinds) if kind in KINDS]
    if found is None or not words or "Literal" in found[3]:
        return message
    return f"{found[1]}{found[2]} is {found[4]}, {' or '.join(words)} is expected"


def _hint(message: str, names: list[str]) -> str:
    """The nearest existing settings or choices for the unknown ones that ``message`` is about."""
    unknown = re.findall(r"--([\w-]+)", message) if "nrecognized" in message else []
    unknown += re.findall(r"Option '([\w.-]+)' is not accepted", message)
    hints = [suggestion(name.replace("-", "_"), names) for name in unknown]
    if choice := re.search(r"Literal\[([^\]]*)\].*?(?:Got|Given) value: (\S+)", message):
        written = choice[2].lower().replace("+", "_plus")  # as titles of methods are written
        hints.append(suggestion(written, re.findall(r"'(\w+)'", choice[1])))
    if "'no'" in message and "Given value: False" in message:
        hints.append(', did you mean "no"? YAML reads it as false without the quotes')
    return "".join(hints)
