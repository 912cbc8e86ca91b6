"""Default and tuned settings of a benchmark's methods beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ether_diffusion.evaluation.statistics import Comparison, compare
from ether_diffusion.evaluation.subjects.compact import WAY
from ether_diffusion.evaluation.subjects.settings import ANCHORS
from ether_diffusion.evaluation.subjects.summary import Metric, Result, Row, unit_values
from ether_diffusion.page.text import number
from ether_diffusion.registry import METHODS, MethodEntry, title_of
from ether_diffusion.runs.record import format_value
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

RATE = "learning_rate"


@dataclass(frozen=True)
class Ran:
    """A method with settings.

    Attributes:
        method: its title.
        arm: what the benchmark calls it; None of default settings that it did not run.
        learning_rate: the rate; None where the method has no default and none was run.
        is_default: whether all settings are the method's defaults.
        settings: those that count, in words; of tuned ones each that differs with its default.
        row: of the summary; None where it did not run.
    """

    method: str
    arm: str | None
    learning_rate: float | None
    is_default: bool
    settings: str
    row: Row | None


def defaults_of(entry: MethodEntry) -> dict[str, Any]:
    """The settings of a method that a user may tune, with their defaults."""
    own = {name: getattr(DreamBoothConfig, name) for name in entry.settings}
    return {RATE: None if entry.rate is None else entry.rate.value, **own}


def changed(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults."""
    return {key: settings[key] for key in defaults if settings.get(key) is not None and settings[key] != defaults[key]}


def tunings(results: Sequence[Result], rows: Sequence[Row]) -> list[Ran]:
    """Of every method its default settings, also where they did not run, and below them what ran.

    Args:
        results: of a benchmark, with their settings; those of pictures that existed have none and are left out, and so
            are further ways of drawing another arm's training.
        rows: of its summary.
    """
    by_key = {(row["arm"], row[RATE]): row for row in rows}
    known: dict[str, list[Ran]] = {}
    defaults: dict[str, Ran] = {}
    seen = set()
    for result in results:
        key = (result["arm"], result[RATE])
        if key in seen or result["arm"] in ANCHORS or "settings" not in result or WAY in result:
            continue
        seen.add(key)
        settings = {"method": DreamBoothConfig.method, **result["settings"]}
        entry, title = METHODS[str(settings["method"])], title_of(settings)
        default = defaults_of(entry)
        differs = changed(settings, default)
        rate = settings.get(RATE) or default[RATE]
        ran = Ran(title, result["arm"], rate, not differs, _told(differs, default), by_key.get(key))
        known.setdefault(title, []).append(ran)
        if default[RATE] is not None:
            told = ", ".join(f"{name} {format_value(value)}" for name, value in default.items() if name != RATE)
            defaults.setdefault(title, Ran(title, None, default[RATE], True, told, None))
    found = []
    for title, of_method in known.items():
        of_default = [ran for ran in of_method if ran.is_default]
        tuned = sorted((ran for ran in of_method if not ran.is_default), key=lambda ran: ran.learning_rate or 0.0)
        found += [*(of_default or ([defaults[title]] if title in defaults else [])), *tuned]
    return found


def _told(differs: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The changed settings, each with its default where there is one."""
    parts = []
    for name, value in differs.items():
        if name == RATE:
            continue
        default = "" if defaults[name] is None else f" (default {format_value(defaults[name])})"
        table = value.items() if isinstance(value, Mapping) else [(name, value)]
        parts += [f"{key} {format_value(each)}{default}" for key, each in table if key != "peft_type"]
    return ", ".join(parts)


def tuned_against_default(results: Sequence[Result], found: Sequence[Ran], metric: Metric) -> list[Comparison]:
    """Every tuned setting minus the default of its method, paired by subject, with Holm's correction."""
    values: dict[str, dict[str, float]] = {}
    pairs = []
    for ran in found:
        if ran.arm is None:
            continue
        own = [r for r in results if r["arm"] == ran.arm and (r[RATE] == (ran.row or {}).get(RATE))]
        values[label(ran)] = unit_values(own, metric)
    for ran in found:
        default = next((d for d in found if d.is_default and d.arm is not None and d.method == ran.method), None)
        if default is not None and not ran.is_default:
            pairs.append((label(ran), label(default)))
    return compare(values, pairs)


def label(ran: Ran) -> str:
    """What a setting is called in comparisons: the arm and its rate."""
    return f"{ran.arm}, {number(ran.learning_rate, 'g')}"
