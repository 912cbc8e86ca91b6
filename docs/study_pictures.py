"""The figures of studies in the docs, from the committed rows of every picture and the studies' configs.

``python docs/study_pictures.py`` writes ``docs/pictures/planned-STUDY.png`` of every study whose config names
comparisons, and of those of ``COMPARED``, whose configs name none; ``docs/pictures/strengths-STUDY.png`` of every
study that drew at several strengths. With names of studies, of these alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from benchmark_tables import TITLES, benchmark, control_comparisons, control_study
from step_tables import load
from study_tables import STUDIES, TEN, TRUTH, compared_losses, results_of, settings_of

from ether_diffusion.evaluation.controls.findings import by_seed
from ether_diffusion.evaluation.figures import Line, Panel, difference_of, write_differences, write_figure
from ether_diffusion.evaluation.mixing.findings import planned as pairs_planned
from ether_diffusion.evaluation.statistics import Comparison
from ether_diffusion.evaluation.subjects.planned import draw_planned
from ether_diffusion.evaluation.subjects.summary import BY_KEY, comparisons, strength_points, unit_values

TENFOLD = "_tenfold"
"""What arms at ten times their rate end with."""
CLIP_T = BY_KEY["clip_t"]


def draw_strengths(study: str, path: Path) -> None:
    """Draw the score that decides against CLIP-T, a line through a method's strengths."""
    titles = {False: "at the tuned rate", True: "at ten times the rate"}
    panels = {tenfold: Panel(f"{TRUTH.title}, {title}", CLIP_T.title) for tenfold, title in titles.items()}
    arms: dict[str, list[tuple[float, float]]] = {}
    for point in strength_points(results_of(study)):
        scores = point.row["scores"]
        arms.setdefault(point.row["arm"], []).append((scores["clip_t"]["mean"], scores[TRUTH.key]["mean"]))
    for arm, places in arms.items():
        x, y = zip(*places, strict=True)
        panels[arm.endswith(TENFOLD)].lines.append(Line(arm.removesuffix(TENFOLD), x, y))
    told = "Means over subjects. Lines: strengths .5, .75, 1 (they can coincide). Single points: strength 1."
    write_figure(path, [panel for panel in panels.values() if panel.lines], share_y=True, caption=[told])


def draw_comparisons(study: str, path: Path) -> None:
    """Draw the planned comparisons of a study, and those without a test: every subject, and the interval."""
    settings = settings_of(study)
    draw_planned(path, results_of(study), settings["planned"], settings.get("secondary", {}), TRUTH)


@dataclass(frozen=True)
class Compared:
    """The planned comparisons of a study whose config does not name them.

    Attributes:
        planned: the comparisons.
        scores: of every arm the score of each unit.
        label: under the axis: what differs, and what a dot is.
    """

    planned: Sequence[Comparison]
    scores: Mapping[str, Mapping[str, float]]
    label: str


def controls(name: str) -> Compared:
    """A study of controls; the unit is the training's seed."""
    study = control_study(name)
    return Compared(control_comparisons(study), by_seed(study), "mIoU; a dot is a seed of the training")


def eight_methods() -> Compared:
    """The leader of the first plan's eight methods against every other of them."""
    results = benchmark("playground")
    arms = {result["arm"] for result in results}
    scores = {arm: unit_values([each for each in results if each["arm"] == arm], TRUTH) for arm in arms}
    return Compared(comparisons(results), scores, f"{TRUTH.title}; a dot is a subject")


def tenfold_rates() -> Compared:
    """What ten times the rate costs other methods more than ETHER+."""
    losses, planned = compared_losses()
    scores = {loss.arm: loss.by_subject for loss in losses if loss.factor == TEN}
    return Compared(planned, scores, f"what ten times the rate costs in {TRUTH.title}; a dot is a subject")


def two_adapters() -> Compared:
    """Sums, products and the better adapter alone; the unit is the pair."""
    scores: dict[str, dict[str, float]] = load("mixing")["scores"]["truth"]
    return Compared(pairs_planned(scores), scores, "truth-likeness of both subjects; a dot is a pair")


COMPARED: dict[str, Callable[[], Compared]] = {
    **{name: partial(controls, name) for name in ("control-rates", "control-more-seeds")},
    "playground": eight_methods,
    "learning-rates": tenfold_rates,
    "mixing": two_adapters,
}
"""The studies with planned comparisons that their configs do not name."""


def title(name: str) -> str:
    """An arm's title, and the way in which it acted."""
    arm, *way = name.split(", ")
    return ", ".join([TITLES.get(arm, arm), *way])


def draw_compared(study: str, path: Path) -> None:
    """Draw the planned comparisons of such a study: every unit, and the interval."""
    compared = COMPARED[study]()
    rows = [
        difference_of(
            f"{title(each.arm)} minus {title(each.rival)}",
            each,
            compared.scores[each.arm],
            compared.scores[each.rival],
        )
        for each in compared.planned
    ]
    write_differences(path, rows, f"difference of {compared.label}, the bar the mean's 95 % interval")


Draw = Callable[[str, Path], None]
"""Draws a figure of a study at a path."""
KINDS: dict[str, Draw] = {"planned": draw_comparisons, "strengths": draw_strengths}
"""By the setting that a study's config has, the figure that it gets."""


def figures() -> dict[str, dict[str, Draw]]:
    """By study its figures."""
    drawn = {study: {kind: draw for kind, draw in KINDS.items() if kind in settings_of(study)} for study in STUDIES}
    return {study: kinds for study, kinds in drawn.items() if kinds} | {
        study: {"planned": draw_compared} for study in COMPARED
    }


def main() -> None:
    """Draw the figures."""
    drawn = figures()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=list(drawn), metavar="STUDY", help=f"of {', '.join(drawn)}")
    asked: list[str] = parser.parse_args().studies
    if unknown := sorted(set(asked) - drawn.keys()):
        parser.error(f"there are no figures of {', '.join(unknown)}, but of {', '.join(drawn)}")
    for study in asked:
        for kind, draw in drawn[study].items():
            path = DOCS / "pictures" / f"{kind}-{study}.png"
            draw(study, path)
            print(path)


if __name__ == "__main__":
    main()
