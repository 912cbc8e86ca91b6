"""The help of a program with a config: its settings in groups, those that most people need or all."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse

from ether_diffusion.ranges import Range
from ether_diffusion.training.groups import UNITS, Group, Groups

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

EVERYTHING = "--help=all"
FLAGS = ("-h", "--help")
KINDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", dict: "MAPPING"}
"""Of values, as the help writes them."""


def asked_for(arguments: list[str]) -> str | None:
    """The flag of a command line that asks for help, if there is one."""
    return next((each for each in arguments if each in FLAGS or each.startswith("--help=")), None)


def help_of(config_class: type[DataclassInstance], prog: str, everything: bool) -> str:
    """The text that ``--help`` prints.

    Args:
        config_class: settings, described in its docstring and those of its bases. ``RANGES`` has the ranges of numbers
            and ``GROUPS`` the groups, if the class has such; a setting in no group stands in a last one.
        prog: the command.
        everything: all settings, not only the common ones.
    """
    return parser_of(config_class, prog, everything).format_help()


def parser_of(config_class: type[DataclassInstance], prog: str, everything: bool = True) -> argparse.ArgumentParser:
    """The flags of a config as a parser of the standard library: for the help and for completion, not for parsing."""
    groups = groups_of(config_class)
    shown = {heading: tuple(group) if everything else group.common for heading, group in groups.items()}
    hidden = sum(len(tuple(group)) for group in groups.values()) - sum(map(len, shown.values()))
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config RECIPE] --SETTING VALUE …",
        description=(config_class.__doc__ or "").split("\n\n")[0],
        epilog=f"{hidden} more settings: {EVERYTHING}" if hidden else None,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        add_help=False,
        allow_abbrev=False,
    )
    command = parser.add_argument_group("command")
    command.add_argument("--config", metavar="RECIPE", help="YAML file of settings, or the name of one in the package")
    more = f"; {EVERYTHING} shows all" if hidden else ""
    command.add_argument("-h", "--help", action="store_true", help=f"show the settings{more}")
    if everything:
        command.add_argument("--print_config", action="store_true", help="print the settings as YAML, and leave")
    described = {field.name: field for field in dataclasses.fields(config_class)}
    kinds, texts = get_type_hints(config_class), descriptions(config_class)
    ranges: Mapping[str, Range] = getattr(config_class, "RANGES", {})
    for heading, names in shown.items():
        section = parser.add_argument_group(_title(heading)) if names else parser
        for name in names:
            facts = _facts(described[name], ranges.get(name))
            text = texts.get(name, "").rstrip(".")
            _add(section, name, kinds[name], f"{text} ({'; '.join(facts)})" if facts else text)
    return parser


def groups_of(config_class: type[DataclassInstance]) -> Groups:
    """The groups of a config's settings; those in none of them stand in a group of their own, the required first."""
    groups: Groups = getattr(config_class, "GROUPS", {})
    known = {name for group in groups.values() for name in group}
    others = [field for field in dataclasses.fields(config_class) if field.name not in known]
    others.sort(key=lambda field: not _is_required(field))
    return {**groups, **({"settings": Group(tuple(field.name for field in others))} if others else {})}


def descriptions(config_class: type[DataclassInstance]) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each setting, on one line."""
    found: dict[str, str] = {}
    for each in reversed(config_class.__mro__):
        params = parse(each.__doc__ or "").params if dataclasses.is_dataclass(each) else []
        found |= {param.arg_name: " ".join((param.description or "").split()) for param in params}
    return found


def _title(heading: str) -> str:
    return "required, here or in the recipe" if heading == "required" else heading


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _facts(field: dataclasses.Field[Any], allowed: Range | None) -> list[str]:
    """Whether a setting must be given, its range and default; where there is no default its text says what holds."""
    facts = ["required"] if _is_required(field) else []
    facts += [] if allowed is None else [str(allowed)]
    if field.default not in (dataclasses.MISSING, None, "", Path()):
        default = str(field.default).lower() if isinstance(field.default, bool) else f"{field.default}"
        facts.append(f"default: {default}")
    return facts


def _add(section: argparse._ActionsContainer, name: str, kind: Any, text: str) -> None:
    """Add a flag: its choices stand in its text, for they may be many."""
    choices = [str(each) for each in choices_of(kind)]
    if bool in _kinds(kind):
        section.add_argument(f"--{name}", nargs="?", metavar="true|false", choices=["true", "false"], help=_safe(text))
    elif choices:
        told = text if all(choice in text for choice in choices) else f"{text}; one of {', '.join(choices)}"
        section.add_argument(f"--{name}", metavar="NAME", choices=choices, help=_safe(told))
    else:
        words = [KINDS[each] for each in _kinds(kind) if each in KINDS]
        section.add_argument(f"--{name}", metavar=UNITS.get(name, words[0] if words else "VALUE"), help=_safe(text))


def _safe(text: str) -> str:
    return text.replace("%", "%%")


def choices_of(kind: Any) -> list[Any]:
    """The values that a type names, also as one of several or in a list."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for part in get_args(kind) for choice in choices_of(part)]


def _kinds(kind: Any) -> Iterator[Any]:
    """The plain types that a type consists of; of containers what they hold."""
    if get_origin(kind) in (Union, UnionType, list):
        for part in get_args(kind):
            yield from _kinds(part)
    elif kind is not NoneType:
        yield get_origin(kind) or kind
