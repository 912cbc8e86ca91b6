"""What pages and tables write: numbers by one formatter, Markdown tables by one writer, names of folders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path


def number(value: float | None, spec: str = ".3f", missing: str = "") -> str:
    """A number as ``spec`` has it; ``missing`` where there is none, or none that is finite."""
    return missing if value is None or not math.isfinite(value) else f"{value:{spec}}"


def decimals(value: float | None, digits: int) -> str:
    """A number with so many decimals, from 10 on with two fewer; ``–`` where there is none."""
    fewer = value is not None and abs(value) >= 10
    return number(value, f"z.{digits - 2 if fewer else digits}f", "–")


def interval(
    mean: float | None, low: float | None, high: float | None, spec: str = ".3f", spread: float | None = None
) -> str:
    """A mean with its spread and its interval, as far as they are known: ``0.412 ± 0.010 [0.380, 0.441]``."""
    around = "" if spread is None else f" ± {number(spread, spec)}"
    ends = "" if low is None else f" [{number(low, spec)}, {number(high, spec)}]"
    return f"{number(mean, spec)}{around}{ends}"


def duration(seconds: float) -> str:
    """A time in words: ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def data_size(size: int) -> str:
    """Bytes in words: ``1.6 MB``; a kilobyte is 1000 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Sequence[int] = (0,)) -> str:
    """A Markdown table whose ``text_columns`` stand to the left and whose others, of numbers, to the right."""
    rule = "".join("---|" if column in text_columns else "---:|" for column in range(len(heads)))
    lines = [f"| {' | '.join(heads)} |", f"|{rule}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their names or, where these are the same, those of their parents above."""
    parts = [folder.resolve().parts for folder in folders]
    while len({part[-1] for part in parts}) == 1 < len(set(parts)):
        parts = [part[:-1] for part in parts]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 picture``, ``1,200 pictures``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
