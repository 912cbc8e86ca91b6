"""What a study of controls found: a table as the paper's Table 3, curves as its Fig. 6, a sheet of samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.data.pairs import load_condition, read_listing
from ether_diffusion.evaluation.figures import Line, Panel, picture_grid, save_picture, write_figure
from ether_diffusion.files import write_text

SHOWN_PAIRS = 8
COLUMNS = (("miou", "mIoU"), ("macc", "mAcc"), ("aacc", "aAcc"), ("fid", "FID"), ("kid", "KID"), ("clip_t", "CLIP-T"))
"""Scores of the table, as far as they are there."""
DIGITS = {"fid": 2}

Result = dict[str, Any]


def read_results(folder: Path, keys: Sequence[str] | None = None) -> dict[str, list[Result]]:
    """The results of every job by its key, by ascending steps; all that are there where no keys are named."""
    root = folder / "results"
    found = keys or sorted(path.name for path in root.iterdir() if path.is_dir())
    return {key: [json.loads(path.read_text()) for path in sorted((root / key).glob("*.json"))] for key in found}


def best_of_arms(results: dict[str, list[Result]]) -> dict[str, Result]:
    """Of every arm the job with the highest mIoU at the last step; arms of which nothing got there are left out."""
    last = max((rows[-1]["steps"] for rows in results.values() if rows), default=0)
    best: dict[str, Result] = {}
    for rows in results.values():
        if rows and rows[-1]["steps"] == last and "scores" in rows[-1]:
            row = rows[-1]
            if row["arm"] not in best or score(row, "miou") > score(best[row["arm"]], "miou"):
                best[row["arm"]] = row
    return best


def score(row: Result, key: str) -> float:
    """A score of a result, its mean over the sample numbers."""
    return float(row["scores"][key]["mean"])


def table(best: dict[str, Result]) -> str:
    """One row per arm at its best rate: parameters of the adapter and of the encoder, and the scores."""
    if not best:
        return "no arm has come to its last step yet\n"
    known = [(key, title) for key, title in COLUMNS if all(key in row["scores"] for row in best.values())]
    heads = ["method", "rate", "adapter", "control", *(title for _, title in known)]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for arm, row in sorted(best.items(), key=lambda item: score(item[1], "miou")):
        counts = dict(row["trained_parameters"])
        control = counts.pop("control_encoder", 0) + counts.pop("controlnet_weights", 0)
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        cells = [arm, rate, f"{sum(counts.values()):,}", f"{control:,}", *(_cell(row, key) for key, _ in known)]
        lines.append(f"| {' | '.join(cells)} |")
    originals = next(iter(best.values()))["originals"]
    if originals:
        cells = ["*originals*", "", "", "", *(_number(originals.get(key), key) for key, _ in known)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Result, key: str) -> str:
    found = row["scores"][key]
    spread = "" if found["spread"] is None else f" ± {_number(found['spread'], key)}"
    return f"{_number(found['mean'], key)}{spread}"


def _number(value: float | None, key: str) -> str:
    return "" if value is None else f"{value:.{DIGITS.get(key, 3)}f}"


def panels(results: dict[str, list[Result]]) -> list[Panel]:
    """One panel per arm: mIoU against the step, a line for each rate."""
    arms: dict[str, list[Line]] = {}
    for rows in results.values():
        scored = [row for row in rows if "scores" in row]
        if scored:
            label = "default" if scored[0]["rate"] is None else f"{scored[0]['rate']:g}"
            line = Line(label, [row["steps"] for row in scored], [score(row, "miou") for row in scored])
            arms.setdefault(scored[0]["arm"], []).append(line)
    return [
        Panel(
            f"{arm}: mIoU", "step", sorted(lines, key=lambda line: float(line.label) if line.label != "default" else 0)
        )
        for arm, lines in arms.items()
    ]


def sheet(folder: Path, best: dict[str, Result]) -> Image.Image | None:
    """The first conditions, their originals, and the first sample of every arm beneath."""
    source = folder / "pairs"
    if not best or not source.is_dir():
        return None
    entries = [entry for entry in read_listing(source)[:SHOWN_PAIRS] if entry.condition is not None]
    rows: list[tuple[str, list[Image.Image]]] = [
        ("condition", [load_condition(str(entry.condition), True) for entry in entries]),
        ("original", [Image.open(entry.image) for entry in entries]),
    ]
    for arm, row in sorted(best.items(), key=lambda item: score(item[1], "miou")):
        files = [folder / row["folder"] / f"{number:05d}-0.png" for number in range(len(entries))]
        if all(path.is_file() for path in files):
            rows.append((f"{arm}, mIoU {score(row, 'miou'):.3f}", [Image.open(path) for path in files]))
    return picture_grid(rows, [])


def write_study(folder: Path, keys: Sequence[str] | None = None) -> str:
    """Write ``table.md``, ``results.json``, ``steps.png`` and ``samples.png`` of what is done; return the table."""
    results = read_results(folder, keys)
    best = best_of_arms(results)
    text = table(best)
    missing = [key for key, rows in results.items() if not rows]
    diverged = [f"{key} at step {row['steps']}" for key, rows in results.items() for row in rows if "diverged" in row]
    for what, names in (("not done yet", missing), ("diverged", diverged)):
        if names:
            text += f"\n{what}: {', '.join(names)}\n"
    write_text(folder / "table.md", text)
    write_text(folder / "results.json", json.dumps({key: rows for key, rows in results.items() if rows}, indent=1))
    if drawn := panels(results):
        write_figure(folder / "steps.png", drawn, columns=3, share_y=True)
    if (picture := sheet(folder, best)) is not None:
        save_picture(picture, folder / "samples.png")
    return text
