"""What the page of many runs shows of a study of controls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ether_diffusion.control.conditions import load_condition
from ether_diffusion.data.pairs import PairFiles
from ether_diffusion.evaluation.controls.differences import difference_caption, read_differences
from ether_diffusion.evaluation.controls.findings import ControlResult, Findings, Setting, mean, read_findings, spread
from ether_diffusion.evaluation.controls.tables import (
    figure,
    first_sample,
    known_measures,
    panels,
    shown_pairs,
    spread_caption,
    steps_caption,
)
from ether_diffusion.evaluation.figures import Panel
from ether_diffusion.evaluation.statistics import Comparison
from ether_diffusion.metrics.control_tasks import Measure
from ether_diffusion.page.pictures import Picture, data_uri, thumbnail
from ether_diffusion.page.svg import COLOURS, TEXT, Curve, dress, figure_style, inline_svg

THUMBNAIL = 128


@dataclass(frozen=True)
class ControlSection:
    """A study of controls in the page.

    Attributes:
        name: what tells it from the page's others.
        findings: of the study.
        measures: what all its finished settings were scored by.
        curves: mIoU against the step, and the differences with their intervals.
        pictures: of some pairs the prompt, and condition, original and a sample of every arm.
        classes: of every class its name, and its IoU in the order of the best settings.
    """

    name: str
    findings: Findings
    measures: list[Measure]
    curves: list[Curve]
    pictures: list[tuple[str, list[Picture]]]
    classes: list[tuple[str, list[float | None]]]

    @property
    def first(self) -> ControlResult:
        """A result of the last step, for what all of them have: judges, choices, warnings, pairs, originals."""
        return next(iter(self.findings.best.values())).last[0]

    @property
    def caption(self) -> str:
        """What the means and ± of the scores are over."""
        return spread_caption(len(next(iter(self.findings.best.values())).seeds))

    def score(self, setting: Setting, key: str) -> tuple[float, str, str]:
        """A score of a setting's last step, the same as text, and its spread as text."""
        value = mean(setting.last, key)
        return value, figure(value, key), figure(spread(setting.last, key), key)


def read_section(folder: Path, name: str) -> ControlSection:
    """Read a study's folder, finished or not.

    Raises:
        FileNotFoundError: it is none, or nothing of it can be compared yet.
    """
    findings = read_findings(folder.resolve())
    if not findings.best:
        raise FileNotFoundError(f"{folder}: nothing can be compared yet: {'; '.join(findings.left_out)}")
    return ControlSection(
        name,
        findings,
        known_measures(findings.finished),
        [
            *_step_curves(name, panels(findings.scored), steps_caption(findings.scored)),
            *_difference_figures(name, read_differences(findings)),
        ],
        _pictures(findings),
        _classes(findings.best),
    )


def _pictures(findings: Findings) -> list[tuple[str, list[Picture]]]:
    rows = []
    for place, entry in enumerate(shown_pairs(findings)):
        shown = [_condition(entry), Picture(thumbnail(entry.image, THUMBNAIL), f"Original {entry.name}", entry.name)]
        for arm, setting in findings.best.items():
            path = first_sample(findings, setting, place)
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


def _step_curves(where: str, shown: Sequence[Panel], of_seeds: str) -> list[Curve]:
    """A figure of every panel, all on one scale."""
    values = [value for panel in shown for line in panel.lines for value in line.y if not math.isnan(value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.05 * (high - low) or 0.05
    caption = (
        f"A line for each learning rate. Before the last step fewer pairs were drawn, one sample of each. {of_seeds}"
    )
    curves = []
    for panel in shown:
        with figure_style(f"{where} {panel.title}"):
            drawn = _small_figure()
            axes = drawn.subplots()
            for place, line in enumerate(panel.lines):
                axes.plot(line.x, line.y, color=COLOURS[place % len(COLOURS)], marker=".", label=line.label)
            axes.set_ylim(low - margin, high + margin)
            dress(axes, panel.x_label, legend=True)
            curves.append(Curve(panel.title, inline_svg(drawn, f"{where} {panel.title}", panel.title), caption))
    return curves


def _difference_figures(where: str, found: Sequence[Comparison]) -> list[Curve]:
    """A figure for each arm that the others are held against."""
    against = list(dict.fromkeys(each.rival for each in found))
    return [_difference_figure(where, other, [each for each in found if each.rival == other]) for other in against]


def _difference_figure(where: str, other: str, found: Sequence[Comparison]) -> Curve:
    title = f"mIoU less that of {other}"
    with figure_style(f"{where} {title}"):
        drawn = _small_figure()
        axes = drawn.subplots()
        for place, each in enumerate(found):
            if each.difference.low is not None and each.difference.high is not None:
                axes.plot([each.difference.low, each.difference.high], [place] * 2, color=COLOURS[0], linewidth=2)
            axes.plot(each.difference.mean, place, "o", color=COLOURS[0])
        axes.axvline(0, color=TEXT, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(found)), [each.arm for each in found], color=TEXT)
        dress(axes, "difference in mIoU", legend=False)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(-0.6, len(found) - 0.4)
        svg = inline_svg(drawn, f"{where} {title}", title)
    return Curve(title, svg, difference_caption(found))


def _small_figure() -> Figure:
    return Figure(figsize=(4.2, 2.8), layout="constrained")
