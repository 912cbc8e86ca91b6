"""A study of controls to look at: its files (a table as the paper's Table 3, curves as its Fig. 6), and its page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from ether_diffusion.control.conditions import load_condition
from ether_diffusion.data.pairs import PairFiles, read_listing
from ether_diffusion.evaluation.controls.findings import (
    ControlResult,
    Findings,
    Setting,
    mean,
    read_differences,
    read_findings,
    spread,
    write_differences,
)
from ether_diffusion.evaluation.figures import Line, Panel, write_figure
from ether_diffusion.evaluation.statistics import Comparison
from ether_diffusion.evaluation.tables import (
    control_rates_table,
    controls_table,
    difference_caption,
    differences_table,
    figure,
    judges_line,
    known_measures,
    spread_caption,
    steps_caption,
)
from ether_diffusion.files import write_text
from ether_diffusion.images import load_image
from ether_diffusion.metrics.control_tasks import Measure
from ether_diffusion.page.palette import Style, styles
from ether_diffusion.page.pictures import Picture, data_uri, picture_grid, save_picture, thumbnail
from ether_diffusion.page.svg import COLOURS, TEXT, Curve, dress, figure_style, inline_svg

SHOWN_PAIRS = 8
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
    def record(self) -> dict[str, str]:
        """What the results depend on: the choices of the scores, the trained settings of each arm, and hashes."""
        found = {choice: str(value) for choice, value in self.first["choices"].items()}
        for arm, setting in self.findings.best.items():
            result = setting.last[0]
            seeds = ", ".join(map(str, setting.seeds))
            found[f"Arm {arm}"] = f"rate {setting.label or 'default'}, seeds {seeds}, {result['steps']:,} steps"
        hashes = self.first.get("base_hash") or {}
        return found | {f"Hash of the base {name}": digest or "not recorded" for name, digest in hashes.items()}

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
        asked = entry.prompt or entry.name
        shown = [_condition(entry), Picture(thumbnail(entry.image, THUMBNAIL), f"Original: {asked}", entry.name)]
        for arm, setting in findings.best.items():
            path = first_sample(findings, setting, place)
            shown.append(
                Picture(thumbnail(path, THUMBNAIL), f"{arm}, step {setting.last[0]['steps']}: {asked}", path.name)
            )
        rows.append((asked, shown))
    return rows


def _condition(entry: PairFiles) -> Picture:
    source = None
    if entry.condition is not None:
        with suppress(OSError, ValueError):  # shown as missing
            source = data_uri(load_condition(entry.condition, True), THUMBNAIL, True)
    return Picture(source, f"Condition: {entry.prompt or entry.name}", entry.name)


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
    curves, known = [], styles([panel.title for panel in shown])
    for panel in shown:
        with figure_style(f"{where} {panel.title}"):
            drawn = _small_figure()
            axes = drawn.subplots()
            colour = COLOURS[known[panel.title].number]
            for place, line in enumerate(panel.lines):  # the arm's colour; its rates differ in dashes and markers
                style = Style(0, place)
                axes.plot(
                    *(line.x, line.y, style.dashes), color=colour, marker=style.marker, markersize=4, label=line.label
                )
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
    known = styles([each.arm for each in found])
    with figure_style(f"{where} {title}"):
        drawn = _small_figure()
        axes = drawn.subplots()
        for place, each in enumerate(found):
            colour = COLOURS[known[each.arm].number]
            if each.difference.low is not None and each.difference.high is not None:
                axes.plot([each.difference.low, each.difference.high], [place] * 2, color=colour, linewidth=2)
            axes.plot(each.difference.mean, place, known[each.arm].marker, color=colour)
        axes.axvline(0, color=TEXT, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(found)), [each.arm for each in found], color=TEXT)
        dress(axes, "difference in mIoU", legend=False)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(-0.6, len(found) - 0.4)
        svg = inline_svg(drawn, f"{where} {title}", title)
    return Curve(title, svg, difference_caption(found))


def _small_figure() -> Figure:
    return Figure(figsize=(4.2, 2.8), layout="constrained")


def panels(settings: Sequence[Setting]) -> list[Panel]:
    """One panel per arm: mIoU against the step, a line for each rate, the mean over the seeds that came there."""
    arms: dict[str, list[Line]] = {}
    for setting in settings:
        line = Line(setting.label or "default", list(setting.steps), [mean(rows) for rows in setting.steps.values()])
        arms.setdefault(setting.arm, []).append(line)
    return [Panel(f"{arm}: mIoU", "step", lines) for arm, lines in arms.items()]


def shown_pairs(findings: Findings) -> list[PairFiles]:
    """The first pairs that all arms drew; none where they are no longer where they were."""
    drawn = min((row["pairs"] for setting in findings.best.values() for row in setting.last), default=0)
    try:
        return read_listing(findings.data, allow_outside_paths=True)[: min(SHOWN_PAIRS, drawn)]
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
        ("original", [load_image(entry.image) for entry in entries]),
    ]
    for arm, setting in findings.best.items():
        files = [first_sample(findings, setting, place) for place in range(len(entries))]
        if all(path.is_file() for path in files):
            rows.append((f"{arm}, mIoU {figure(mean(setting.last))}", [Image.open(path) for path in files]))
    return picture_grid(rows, [])


def write_study(folder: Path) -> str:
    """Write ``table.md``, ``results.json``, ``steps.png`` and ``samples.png`` of what is done; return the tables."""
    findings = read_findings(folder)
    text = controls_table(findings.best)
    if by_rate := control_rates_table(findings):
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


def write_compared(folder: Path, against: Sequence[str]) -> str:
    """Write ``differences.json`` and ``differences.md`` of a study's folder; return the table."""
    text = differences_table(write_differences(folder, against))
    write_text(folder / "differences.md", text)
    return text
