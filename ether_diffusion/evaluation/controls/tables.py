"""The files of a study of controls: a table as the paper's Table 3, curves as its Fig. 6, a sheet of samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from ether_diffusion.control.conditions import load_condition
from ether_diffusion.data.pairs import PairFiles, read_listing
from ether_diffusion.evaluation.controls.differences import ONE_SEED
from ether_diffusion.evaluation.controls.findings import (
    MEASURES,
    MIOU,
    Findings,
    Setting,
    mean,
    read_findings,
    spread,
)
from ether_diffusion.evaluation.figures import Line, Panel, write_figure
from ether_diffusion.evaluation.tables import judges_line
from ether_diffusion.files import write_text
from ether_diffusion.metrics.control_tasks import Measure
from ether_diffusion.page.pictures import picture_grid, save_picture
from ether_diffusion.page.text import markdown_table, number

SHOWN_PAIRS = 8
DIGITS = {"fid": 2}


def known_measures(settings: Iterable[Setting]) -> list[Measure]:
    """What all the settings were scored by."""
    scores = [row["scores"] for setting in settings for row in setting.last]
    return [measure for key, measure in MEASURES.items() if all(key in found for found in scores)]


def table(best: dict[str, Setting]) -> str:
    """One row per arm at its best rate: parameters of the adapter and of the encoder, and the scores."""
    if not best:
        return "nothing can be compared yet\n"
    keys = {measure.key: measure.title for measure in known_measures(best.values())}
    first = next(iter(best.values()))
    heads = ["method", "rate", "adapter", "control", *keys.values()]
    rows = []
    for arm, setting in best.items():
        facts = [setting.label, *(f"{count:,}" for count in setting.counts)]
        rows.append([arm, *facts, *(cell(setting, key) for key in keys)])
    if originals := first.last[0]["originals"]:
        rows.append(["*originals*", "", "", "", *(figure(originals.get(key), key) for key in keys)])
    return markdown_table(heads, rows) + f"\n{spread_caption(len(first.seeds))}\n"


def spread_caption(seeds: int) -> str:
    """What the means and ± of a table of so many seeds are over."""
    if seeds > 1:
        return f"Means over {seeds} seeds of the training; ± is their standard deviation."
    return f"{ONE_SEED} ± is the standard deviation over the sample numbers."


def rates_table(findings: Findings) -> str:
    """MIoU at every rate, a row for each arm that has several.

    Of several seeds also the highest less the lowest, where none diverged; of one seed that would be noise.
    """
    arms: dict[str, dict[float, float]] = {}
    for setting in findings.finished:
        if setting.rate is not None:
            arms.setdefault(setting.arm, {})[setting.rate] = mean(setting.last)
    for arm, rate in findings.diverged:
        if rate is not None:
            arms.setdefault(arm, {})[rate] = math.nan
    several = {arm: dict(sorted(values.items())) for arm, values in arms.items() if len(values) > 1}
    if not several:
        return ""
    widest, seeds = max(map(len, several.values())), len(findings.finished[0].seeds) if findings.finished else 1
    rows = []
    for arm, values in several.items():
        cells = [f"{figure(value) or 'diverged'} ({rate:g})" for rate, value in values.items()]
        row = [arm, *cells, *[""] * (widest - len(cells))]
        if seeds > 1:
            whole = not any(map(math.isnan, values.values()))
            row.append(figure(max(values.values()) - min(values.values())) if whole else "")
        rows.append(row)
    heads = ["method", *(f"rate {place + 1}" for place in range(widest))]
    told = f"Means over {seeds} seeds of the training." if seeds > 1 else ONE_SEED
    return f"{markdown_table([*heads, *(['highest - lowest'] if seeds > 1 else [])], rows)}\n{told}\n"


def cell(setting: Setting, key: str = MIOU) -> str:
    """A score of a setting's last step with its spread."""
    deviation = spread(setting.last, key)
    return figure(mean(setting.last, key), key) + ("" if deviation is None else f" ± {figure(deviation, key)}")


def figure(value: float | None, key: str = MIOU) -> str:
    """A score's value, with as many digits as mean something."""
    return number(value, f".{DIGITS.get(key, 3)}f")


def panels(settings: Sequence[Setting]) -> list[Panel]:
    """One panel per arm: mIoU against the step, a line for each rate, the mean over the seeds that came there."""
    arms: dict[str, list[Line]] = {}
    for setting in settings:
        line = Line(setting.label or "default", list(setting.steps), [mean(rows) for rows in setting.steps.values()])
        arms.setdefault(setting.arm, []).append(line)
    return [Panel(f"{arm}: mIoU", "step", lines) for arm, lines in arms.items()]


def steps_caption(settings: Iterable[Setting]) -> str:
    """Of how many seeds the points of :func:`panels` are; those of an unfinished study may differ."""
    counts = {len(rows) for setting in settings for rows in setting.steps.values()}
    fewest, most = min(counts, default=1), max(counts, default=1)
    if most < 2:
        return ONE_SEED
    span = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"Means over {span} seeds of the training."


def shown_pairs(findings: Findings) -> list[PairFiles]:
    """The first pairs that all arms drew; none where they are no longer where they were."""
    drawn = min((row["pairs"] for setting in findings.best.values() for row in setting.last), default=0)
    try:
        return read_listing(findings.data)[: min(SHOWN_PAIRS, drawn)]
    except (OSError, ValueError):
        return []


def first_sample(findings: Findings, setting: Setting, place: int) -> Path:
    """What an arm drew first for the pair at a place of the listing."""
    return findings.folder / setting.last[0]["folder"] / f"{place:05d}-0.png"


def sheet(findings: Findings) -> Image.Image | None:
    """The first conditions, their originals, and the first sample of every arm beneath."""
    entries = shown_pairs(findings)
    if not entries or not all(entry.condition for entry in entries):
        return None
    rows: list[tuple[str, list[Image.Image]]] = [
        ("condition", [load_condition(str(entry.condition), True) for entry in entries]),
        ("original", [Image.open(entry.image) for entry in entries]),
    ]
    for arm, setting in findings.best.items():
        files = [first_sample(findings, setting, place) for place in range(len(entries))]
        if all(path.is_file() for path in files):
            rows.append((f"{arm}, mIoU {figure(mean(setting.last))}", [Image.open(path) for path in files]))
    return picture_grid(rows, [])


def write_study(folder: Path) -> str:
    """Write ``table.md``, ``results.json``, ``steps.png`` and ``samples.png`` of what is done; return the tables."""
    findings = read_findings(folder)
    text = table(findings.best)
    if by_rate := rates_table(findings):
        text += f"\n{by_rate}"
    if left_out := findings.left_out:
        text += f"\nNot in the tables: {'; '.join(left_out)}\n"
    if findings.best:
        first = next(iter(findings.best.values())).last[0]
        text += "".join(f"\n{warning}\n" for warning in first.get("warnings", []))
        text += f"\n{judges_line(first.get('judges', {}))}\n"
    write_text(folder / "table.md", text)
    done = {key: rows for key, rows in findings.results.items() if rows}
    write_text(folder / "results.json", json.dumps(done, indent=1))
    if drawn := panels(findings.scored):
        told = steps_caption(findings.scored)
        write_figure(folder / "steps.png", drawn, columns=3, share_y=True, caption=[told])
    if (picture := sheet(findings)) is not None:
        save_picture(picture, folder / "samples.png")
    return text
