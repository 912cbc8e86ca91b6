"""The files of a study of controls: a table as the paper's Table 3, curves as its Fig. 6, a sheet of samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from ether_diffusion.data.pairs import load_condition, read_listing
from ether_diffusion.evaluation.control_summary import (
    FIRST,
    Setting,
    best_of_arms,
    finished,
    mean,
    pairs_of,
    read_results,
    settings_of,
    spread,
    unfinished,
)
from ether_diffusion.evaluation.figures import Line, Panel, picture_grid, save_picture, write_figure
from ether_diffusion.files import write_text

SHOWN_PAIRS = 8
COLUMNS = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc", "fid": "FID", "kid": "KID", "clip_t": "CLIP-T"}
"""Scores of the table, as far as they are there."""
DIGITS = {"fid": 2}


def known_columns(best: Iterable[Setting]) -> dict[str, str]:
    """The scores that all arms have, with their titles."""
    scores = [row["scores"] for setting in best for row in setting.last]
    return {key: title for key, title in COLUMNS.items() if all(key in found for found in scores)}


def table(best: dict[str, Setting]) -> str:
    """One row per arm at its best rate: parameters of the adapter and of the encoder, and the scores."""
    if not best:
        return "no arm has come to its last step yet\n"
    columns = known_columns(best.values())
    seeds = ["seeds"] * any(len(setting.last) > 1 for setting in best.values())
    heads = ["method", "rate", "adapter", "control", *seeds, *columns.values()]
    rows = []
    for arm, setting in best.items():
        facts = [setting.label, *(f"{count:,}" for count in setting.counts), *[str(len(setting.last))] * len(seeds)]
        rows.append([arm, *facts, *(cell(setting, key) for key in columns)])
    if originals := next(iter(best.values())).last[0]["originals"]:
        rows.append(["*originals*", *[""] * (3 + len(seeds)), *(number(originals.get(key), key) for key in columns)])
    return markdown(heads, rows)


def rates_table(settings: Sequence[Setting]) -> str:
    """mIoU at every rate, a row for each arm that has several, with the highest less the lowest."""
    arms: dict[str, list[Setting]] = {}
    for setting in settings:
        arms.setdefault(setting.arm, []).append(setting)
    several = {arm: found for arm, found in arms.items() if len(found) > 1}
    widest = max(map(len, several.values()), default=0)
    rows = []
    for arm, found in several.items():
        values = [mean(setting.last) for setting in found]
        cells = [f"{value:.3f} ({setting.label})" for value, setting in zip(values, found, strict=True)]
        rows.append([arm, *cells, *[""] * (widest - len(cells)), f"{max(values) - min(values):.3f}"])
    heads = ["method", *(f"rate {place + 1}" for place in range(widest)), "highest - lowest"]
    return markdown(heads, sorted(rows, key=lambda row: row[-1])) if rows else ""


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its numbers to the right."""
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def cell(setting: Setting, key: str = FIRST) -> str:
    """A score of a setting's last step with its spread."""
    deviation = spread(setting.last, key)
    return number(mean(setting.last, key), key) + ("" if deviation is None else f" ± {number(deviation, key)}")


def number(value: float | None, key: str = FIRST) -> str:
    """A score's value, with as many digits as mean something."""
    return "" if value is None else f"{value:.{DIGITS.get(key, 3)}f}"


def panels(settings: Sequence[Setting]) -> list[Panel]:
    """One panel per arm: mIoU against the step, a line for each rate, the mean over the seeds that came there."""
    arms: dict[str, list[Line]] = {}
    for setting in settings:
        line = Line(setting.label or "default", list(setting.steps), [mean(rows) for rows in setting.steps.values()])
        arms.setdefault(setting.arm, []).append(line)
    return [Panel(f"{arm}: mIoU", "step", lines) for arm, lines in arms.items()]


def sheet(folder: Path, best: dict[str, Setting]) -> Image.Image | None:
    """The first conditions, their originals, and the first sample of every arm beneath."""
    source = pairs_of(folder)
    if not best or not source.is_dir():
        return None
    entries = [entry for entry in read_listing(source)[:SHOWN_PAIRS] if entry.condition is not None]
    rows: list[tuple[str, list[Image.Image]]] = [
        ("condition", [load_condition(str(entry.condition), True) for entry in entries]),
        ("original", [Image.open(entry.image) for entry in entries]),
    ]
    for arm, setting in best.items():
        files = [folder / setting.last[0]["folder"] / f"{place:05d}-0.png" for place in range(len(entries))]
        if all(path.is_file() for path in files):
            rows.append((f"{arm}, mIoU {mean(setting.last):.3f}", [Image.open(path) for path in files]))
    return picture_grid(rows, [])


def write_study(folder: Path) -> str:
    """Write ``table.md``, ``results.json``, ``steps.png`` and ``samples.png`` of what is done; return the tables."""
    results = read_results(folder)
    done = finished(results)
    best = best_of_arms(done)
    text = table(best)
    if by_rate := rates_table(done):
        text += f"\n{by_rate}"
    for what, names in unfinished(results).items():
        text += f"\n{what}: {', '.join(names)}\n"
    write_text(folder / "table.md", text)
    write_text(folder / "results.json", json.dumps({key: rows for key, rows in results.items() if rows}, indent=1))
    if drawn := panels(settings_of(results)):
        write_figure(folder / "steps.png", drawn, columns=3, share_y=True)
    if (picture := sheet(folder, best)) is not None:
        save_picture(picture, folder / "samples.png")
    return text
