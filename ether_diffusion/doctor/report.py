"""The state of this machine, found and told: packages, extras, devices, bases, what can be trained, what is amiss."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from ether_diffusion.doctor.bases import KnownBase, known_bases
from ether_diffusion.doctor.capacity import RESERVE, RESOLUTIONS, Fit, fits
from ether_diffusion.doctor.devices import Device, devices
from ether_diffusion.doctor.faults import Fault, faults
from ether_diffusion.doctor.packages import DISTRIBUTION, Extra, extras, versions

GIBIBYTE = 2**30
STATES = {"embedded": "comes with the package", "here": "in the cache", "absent": "not in the cache"}


@dataclass(frozen=True)
class Findings:
    """All that was found.

    Attributes:
        version: of this package.
        python: version.
        system: such as Linux.
        packages: versions of the packages that matter, None for those that are not there.
        extras: optional parts.
        devices: that torch sees.
        bases: of the recipes.
        memory: bytes that ``fits`` is about.
        half: whether it is about bf16; else fp32.
        fits: what can be trained.
        faults: what is amiss.
    """

    version: str
    python: str
    system: str
    packages: dict[str, str | None]
    extras: list[Extra]
    devices: list[Device]
    bases: list[KnownBase]
    memory: int
    half: bool
    fits: list[Fit]
    faults: list[Fault]


def examine(memory: int | None = None) -> Findings:
    """Look at this machine.

    Args:
        memory: bytes of a card that what can be trained is asked for; of the largest device here by default.
    """
    found, optional, bases = devices(), extras(), known_bases()
    largest = max(found, key=lambda device: (not device.is_cpu, device.memory))
    half = memory is not None or (not largest.is_cpu and "bf16" in largest.precisions)
    size = largest.memory if memory is None else memory
    return Findings(
        version(DISTRIBUTION),
        platform.python_version(),
        platform.system(),
        versions(),
        optional,
        found,
        bases,
        size,
        half,
        fits(size, half),
        faults(optional, found, bases),
    )


def text(findings: Findings) -> str:
    """The findings for people."""
    found = findings
    return "\n".join(
        [
            f"{DISTRIBUTION} {found.version}, Python {found.python}, {found.system}",
            *_section("Packages", ((name, each or "not installed") for name, each in found.packages.items())),
            *_section("Extras", (_extra(each) for each in found.extras)),
            *_section("Devices", (_device(each) for each in found.devices)),
            *_section("Bases of the recipes", (_base(each) for each in found.bases)),
            *_section(_heading(found), _fits(found.fits)),
            *_section("What is amiss", _faults(found.faults)),
        ]
    )


def _section(heading: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """A heading and aligned columns below it."""
    lines = [list(row) for row in rows]
    columns = max((len(line) for line in lines), default=0)
    widths = [
        max((len(line[column]) for line in lines if column < len(line) - 1), default=0) for column in range(columns)
    ]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)) for line in lines)
    return ["", heading, *(f"  {line}".rstrip() for line in padded)]


def _extra(extra: Extra) -> Sequence[str]:
    if not extra.missing:
        return extra.name, "installed"
    return extra.name, f"not there: {', '.join(extra.missing)}", extra.command


def _device(device: Device) -> Sequence[str]:
    memory = f"{device.memory / GIBIBYTE:.1f} GiB, {device.free / GIBIBYTE:.1f} free"
    return device.name, device.title, memory, f"mixed_precision {', '.join(device.precisions)}"


def _base(base: KnownBase) -> Sequence[str]:
    state = f"incomplete, without {', '.join(base.lacks)}" if base.lacks else STATES[base.state]
    return base.name, state, f"--config {', '.join(base.recipes)}"


def _heading(found: Findings) -> str:
    precision = "--mixed_precision bf16" if found.half else "fp32"
    return (
        f"What can be trained in {found.memory / GIBIBYTE:.1f} GiB ({precision}; batch 1, ETHER+ on attention; "
        f"computed, not measured, {RESERVE / GIBIBYTE:.0f} GiB left free)"
    )


def _fits(found: Sequence[Fit]) -> Iterable[Sequence[str]]:
    yield "", *(f"{resolution} px" for resolution in RESOLUTIONS)
    for base in dict.fromkeys(each.base for each in found):
        yield base, *(_fit(each) for each in found if each.base == base)


def _fit(fit: Fit) -> str:
    needs = f"{fit.needs / GIBIBYTE:.1f} GiB"
    if not fit.fits:
        return f"no: {needs} at least"
    return f"{needs} {' '.join(fit.flags)}".rstrip()


def _faults(found: Sequence[Fault]) -> Iterable[Sequence[str]]:
    if not found:
        yield ("nothing that is known",)
    for fault in found:
        yield (f"{'stops training: ' if fault.stops else ''}{fault.what}",)
        yield (f"  -> {fault.remedy}",)
