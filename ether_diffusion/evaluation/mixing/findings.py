"""What the pairs show: means over pairs with intervals, the planned comparisons, and a sheet of pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ether_diffusion.evaluation.mixing.settings import ANCHORS, BASE, TRUTH
from ether_diffusion.evaluation.mixing.ways import FIRST, PRODUCT, SECOND, SUM
from ether_diffusion.evaluation.statistics import Comparison, compare, mean_interval
from ether_diffusion.evaluation.tables import comparison_cells, judges_line
from ether_diffusion.files import write_text
from ether_diffusion.images import load_image
from ether_diffusion.page.pictures import picture_grid, save_picture
from ether_diffusion.page.text import interval, markdown_table

BEST_ALONE = "better alone"
SCORES = {"truth": "truth-likeness ↑", "clip_t": "CLIP-T ↑"}


@dataclass(frozen=True)
class PairResult:
    """What one arm drew of one pair.

    Attributes:
        arm: a method, or an anchor.
        pair: its name.
        seed: of trainings and pictures.
        settings_hash: stands for all settings that the pictures depend on.
        ways: rows of pictures by the way in which the adapters acted.
        judges: who scored.
    """

    arm: str
    pair: str
    seed: int
    settings_hash: str
    ways: dict[str, list[dict[str, Any]]]
    judges: dict[str, dict[str, str]]


def by_pair(results: Sequence[PairResult], score: str) -> dict[str, dict[str, float]]:
    """The mean score of every pair, by arm and way: "ether_plus, sum"; anchors have their own name alone.

    Of a method with both also the better of its adapters alone, chosen for each pair.
    """
    found: dict[str, dict[str, float]] = {}
    for result in results:
        means = {way: fmean(row[score] for row in rows) for way, rows in result.ways.items()}
        if FIRST in means and SECOND in means:
            means[BEST_ALONE] = max(means[FIRST], means[SECOND])
        for way, value in means.items():
            name = result.arm if result.arm in ANCHORS else f"{result.arm}, {way}"
            found.setdefault(name, {})[result.pair] = value
    return found


def planned(known: dict[str, dict[str, float]]) -> list[Comparison]:
    """Sum against product and against the better alone of every method, and the sums of all pairs of methods."""
    arms = [name.removesuffix(f", {SUM}") for name in known if name.endswith(f", {SUM}")]
    pairs = [(f"{arm}, {SUM}", f"{arm}, {other}") for arm in arms for other in (PRODUCT, BEST_ALONE)]
    pairs += [(f"{a}, {SUM}", f"{b}, {SUM}") for n, a in enumerate(arms) for b in arms[n + 1 :]]
    return compare(known, [(a, b) for a, b in pairs if b in known])


def write_findings(folder: Path, results: Sequence[PairResult], missing: Sequence[str]) -> str:
    """Write ``mixing.md``, ``findings.json`` and ``mixing.png`` into the folder; return the text."""
    if not results:
        return "no pair is done yet\n"
    tables = {score: by_pair(results, score) for score in SCORES}
    compared = planned(tables["truth"])
    text = "\n".join(
        [
            scores_table(tables),
            comparisons_table(compared),
            f"{len({result.pair for result in results})} pairs; in brackets the 95 % interval over pairs.",
            judges_line(results[0].judges),
            *([f"Not in these tables ({len(missing)}): {', '.join(missing)}"] if missing else []),
        ]
    )
    content = {"scores": tables, "comparisons": compared, "missing": list(missing), "judges": results[0].judges}
    write_text(folder / "findings.json", json.dumps(content, indent=1, default=asdict))
    write_text(folder / "mixing.md", text + "\n")
    save_picture(draw_sheet(folder, results), folder / "mixing.png")
    return text + "\n"


def scores_table(tables: dict[str, dict[str, dict[str, float]]]) -> str:
    """One row per arm and way."""
    rows = []
    for name in tables["truth"]:
        estimates = [mean_interval(tables[score][name].values()) for score in SCORES]
        rows.append([name, *(interval(each.mean, each.low, each.high) for each in estimates)])
    return markdown_table(["", *SCORES.values()], rows)


def comparisons_table(found: Sequence[Comparison]) -> str:
    """The planned differences in truth-likeness."""
    heads = ["", "minus", "difference in truth-likeness, 95 % interval", "p (Holm)", "pairs", ""]
    rows = [[each.arm, each.rival, *comparison_cells(each)] for each in found]
    return markdown_table(heads, rows)


def draw_sheet(folder: Path, results: Sequence[PairResult]) -> Any:
    """A row per pair, its second prompt's first picture; a column for every arm and way."""
    columns = list(dict.fromkeys((result.arm, way) for result in results for way in result.ways))
    columns.sort(key=lambda each: (each[0] != TRUTH, each[0] != BASE))
    rows = []
    for pair in dict.fromkeys(result.pair for result in results):
        ways = {(r.arm, way): rows for r in results if r.pair == pair for way, rows in r.ways.items()}
        if any(column not in ways for column in columns):
            continue
        prompts = list(dict.fromkeys(row["prompt"] for row in ways[columns[0]]))
        shown = prompts[min(1, len(prompts) - 1)]
        files = [next(row["file"] for row in ways[column] if row["prompt"] == shown) for column in columns]
        rows.append((shown, [load_image(folder / file) for file in files]))
    return picture_grid(rows, [arm if arm in ANCHORS else f"{arm}\n{way}" for arm, way in columns])
