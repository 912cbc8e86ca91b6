"""What the page of many runs shows of a study of controls."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ether_diffusion.data.pairs import PairFiles, load_condition, read_listing
from ether_diffusion.evaluation.control_intervals import DIFFERENCES
from ether_diffusion.evaluation.control_summary import (
    Result,
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
from ether_diffusion.evaluation.control_tables import SHOWN_PAIRS, known_columns
from ether_diffusion.page.pictures import Picture, data_uri, thumbnail
from ether_diffusion.page.svg import COLOURS, TEXT, Curve, dress, figure_style, inline_svg

THUMBNAIL = 128
LOWER_IS_BETTER = ("fid", "kid")


@dataclass(frozen=True)
class ControlSection:
    """A study of controls in the page.

    Attributes:
        folder: the study's.
        columns: the scores' titles by key.
        settings: every arm at every rate that is finished.
        best: every arm at its best rate, by ascending mIoU.
        originals: the judge's scores on the real pictures, by key.
        curves: mIoU against the step, and the differences with their intervals.
        pictures: of some pairs the prompt, and condition, original and a sample of every arm.
        classes: of every class its name, and its IoU in the order of ``best``.
        left_out: jobs that are not in the tables, in words.
    """

    folder: Path
    columns: dict[str, str]
    settings: list[Setting]
    best: dict[str, Setting]
    originals: dict[str, float]
    curves: list[Curve]
    pictures: list[tuple[str, list[Picture]]]
    classes: list[tuple[str, list[float | None]]]
    left_out: list[str]

    @property
    def first(self) -> Result:
        """A result of the last step, for what all of them have: judges, choices, warnings, pairs."""
        return next(iter(self.best.values())).last[0]

    def score(self, setting: Setting, key: str) -> tuple[float, float | None]:
        """A score of a setting's last step and its spread."""
        return mean(setting.last, key), spread(setting.last, key)

    def arrow(self, key: str) -> str:
        """Where better is."""
        return "↓" if key in LOWER_IS_BETTER else "↑"


def read_section(folder: Path) -> ControlSection:
    """Read a study's folder, finished or not.

    Raises:
        FileNotFoundError: it is none, or no arm of it has come to its last step yet.
    """
    folder = folder.resolve()
    results = read_results(folder)
    done = finished(results)
    best = best_of_arms(done)
    if not best:
        raise FileNotFoundError(f"{folder} is a study of controls in which no method has come to its last step yet")
    return ControlSection(
        folder,
        known_columns(done),
        done,
        best,
        next(iter(best.values())).last[0]["originals"],
        [*_step_curves(folder.name, settings_of(results)), *_difference_figures(folder)],
        _pictures(folder, best),
        _classes(best),
        [f"{', '.join(names)} ({what})" for what, names in unfinished(results).items()],
    )


def _pictures(folder: Path, best: Mapping[str, Setting]) -> list[tuple[str, list[Picture]]]:
    """The first pairs; none where they are no longer where they were."""
    source, rows = pairs_of(folder), []
    entries = read_listing(source)[:SHOWN_PAIRS] if source.is_dir() else []
    for place, entry in enumerate(entries):
        shown = [_condition(entry), Picture(thumbnail(entry.image, THUMBNAIL), f"Original {entry.name}", entry.name)]
        for arm, setting in best.items():
            path = folder / setting.last[0]["folder"] / f"{place:05d}-0.png"
            shown.append(Picture(thumbnail(path, THUMBNAIL), f"{arm}: {entry.name}", f"{arm}, {path.name}"))
        rows.append((entry.prompt or entry.name, shown))
    return rows


def _condition(entry: PairFiles) -> Picture:
    source = None
    if entry.condition is not None:
        with suppress(OSError, ValueError):  # shown as missing
            source = data_uri(load_condition(entry.condition, True), THUMBNAIL, True)
    return Picture(source, f"Condition {entry.name}", entry.name)


def _classes(best: Mapping[str, Setting]) -> list[tuple[str, list[float | None]]]:
    """IoU of every class and arm, the mean over the seeds in which it occurs."""
    ious: dict[str, dict[str, list[float]]] = {}
    for arm, setting in best.items():
        for row in (row for result in setting.last for row in result["classes"] if row["iou"] is not None):
            ious.setdefault(row["name"], {}).setdefault(arm, []).append(row["iou"])
    return [
        (name, [statistics.fmean(of_arms[arm]) if arm in of_arms else None for arm in best])
        for name, of_arms in ious.items()
    ]


def _step_curves(where: str, settings: Sequence[Setting]) -> list[Curve]:
    """One figure per arm, all on one scale: mIoU against the step, a line for each rate."""
    values = [[mean(rows) for rows in setting.steps.values()] for setting in settings]
    low, high = min(map(min, values)), max(map(max, values))
    margin = 0.05 * (high - low) or 0.05
    curves = []
    for arm in dict.fromkeys(setting.arm for setting in settings):
        title = f"{arm}: mIoU against the step"
        with figure_style(f"{where} {title}"):
            figure = Figure(figsize=(4.2, 2.8), layout="constrained")
            axes = figure.subplots()
            of_arm = [(setting, line) for setting, line in zip(settings, values, strict=True) if setting.arm == arm]
            for number, (setting, line) in enumerate(of_arm):
                colour = COLOURS[number % len(COLOURS)]
                axes.plot(list(setting.steps), line, color=colour, marker=".", label=setting.label or "default")
            axes.set_ylim(low - margin, high + margin)
            dress(axes, "step", legend=True)
            curves.append(Curve(title, inline_svg(figure, f"{where} {title}", title), "A line for each learning rate."))
    return curves


def _difference_figures(folder: Path) -> list[Curve]:
    """What ``differences.json`` holds, a figure for each arm that the others are held against."""
    if not (folder / DIFFERENCES).is_file():
        return []
    found: dict[str, dict[str, list[float]]] = json.loads((folder / DIFFERENCES).read_text())
    return [
        _difference_figure(folder.name, other, {arm: others[other] for arm, others in found.items() if other in others})
        for other in found
        if any(other in others for others in found.values())
    ]


def _difference_figure(where: str, other: str, differences: dict[str, Any]) -> Curve:
    title = f"Difference in mIoU to {other}"
    with figure_style(f"{where} {title}"):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.subplots()
        for place, (difference, low, high) in enumerate(differences.values()):
            axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=2)
            axes.plot(difference, place, "o", color=COLOURS[0])
        axes.axvline(0, color=TEXT, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(differences)), list(differences), color=TEXT)
        dress(axes, "mIoU", legend=False)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(-0.6, len(differences) - 0.4)
        svg = inline_svg(figure, f"{where} {title}", title)
    return Curve(title, svg, "With its 95% interval over the pairs; one that crosses the line shows no difference.")
