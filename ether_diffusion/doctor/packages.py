"""Installed packages, from their metadata alone: none of them is imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

DISTRIBUTION = "ether-diffusion"
SHOWN = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub")
"""Packages whose versions results depend on, and which reports of faults should name."""
FOR_DEVELOPERS = ("dev",)
"""Extras that are of no use to those who train."""


@dataclass(frozen=True)
class Extra:
    """An optional part of this package.

    Attributes:
        name: as in ``ether-diffusion[name]``.
        missing: what it needs and is not there, or is there in another version, in words.
        begun: whether the package that it is for is there.
        command: installs it.
    """

    name: str
    missing: tuple[str, ...]
    begun: bool
    command: str


def versions() -> dict[str, str | None]:
    """The versions of the packages that matter; None for those that are not installed."""
    return {name: installed_version(name) for name in SHOWN}


def unmet(distribution: str = DISTRIBUTION) -> list[str]:
    """What a package itself needs and is not there in a version that it takes, in words."""
    return [told for need in _needs(distribution) if (told := _missing(need)) is not None]


def extras(distribution: str = DISTRIBUTION) -> list[Extra]:
    """The extras of a package, in the order in which it lists them."""
    names = {name: None for line in requires(distribution) or [] for name in _extra_of(line)}
    found = []
    for name in names:
        if name in FOR_DEVELOPERS:
            continue
        needs = list(_needs(distribution, name))
        missing = tuple(told for need in needs if (told := _missing(need)) is not None)
        own = next(need for need in _needs(distribution, name, nested=False))
        found.append(Extra(name, missing, installed_version(own.name) is not None, install_command(distribution, name)))
    return found


def install_command(distribution: str, extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install '{distribution}[{extra}]'"


def _extra_of(line: str) -> list[str]:
    """The extra for which a line of requirements is, if it is for one."""
    marker = Requirement(line).marker
    text = "" if marker is None else str(marker)
    return [text.partition('extra == "')[2].partition('"')[0]] if "extra ==" in text else []


def _needs(distribution: str, extra: str = "", nested: bool = True) -> Iterator[Requirement]:
    """What an extra adds, those of extras within it first; "" is the package itself."""
    for line in requires(distribution) or []:
        need = Requirement(line)
        if (_extra_of(line) or [""]) != [extra] or (need.marker and not need.marker.evaluate({"extra": extra})):
            continue
        if need.name != distribution:
            yield need
        elif nested:
            for other in sorted(need.extras):
                yield from _needs(distribution, other)


def _missing(need: Requirement) -> str | None:
    """A requirement in words where it is not met."""
    found = installed_version(need.name)
    if found is None:
        return need.name
    return None if need.specifier.contains(found, prereleases=True) else f"{need.name} {need.specifier} (it is {found})"


def installed_version(name: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
