"""The figures of studies in the docs, from the committed rows of every picture and the studies' configs.

``python docs/study_pictures.py`` writes ``docs/pictures/planned-STUDY.png`` of every study whose config names
comparisons, and of the studies of controls; ``docs/pictures/strengths-STUDY.png`` of every study that drew at several
strengths. With names of studies, of these alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from benchmark_tables import control_comparisons, control_study
from study_tables import STUDIES, TRUTH, results_of, settings_of

from ether_diffusion.evaluation.controls.findings import MIOU
from ether_diffusion.evaluation.figures import Difference, Line, Panel, write_differences, write_figure
from ether_diffusion.evaluation.subjects.planned import draw_planned
from ether_diffusion.evaluation.subjects.summary import BY_KEY, strength_points
from ether_diffusion.page.text import number

CONTROLS = ("control-rates", "control-more-seeds")
"""The studies of controls with planned comparisons."""
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


def draw_controls(study: str, path: Path) -> None:
    """Draw the planned comparisons of a study of controls: every seed, and the interval."""
    found = control_study(study)
    scores = {
        arm: {row["seed"]: row["scores"][MIOU]["mean"] for row in setting.last} for arm, setting in found.best.items()
    }
    rows = []
    for each in control_comparisons(found):
        first, second = scores[each.arm], scores[each.rival]
        told = f"p = {number(each.p_holm, '.2g')}" + ", separated" * each.separated
        values = [first[seed] - second[seed] for seed in sorted(first)]
        rows.append(Difference(f"{each.arm} minus {each.rival}", values, each.difference, told))
    write_differences(
        path, rows, "difference of mIoU; a dot is a seed of the training, the bar the mean's 95 % interval"
    )


Draw = Callable[[str, Path], None]
"""Draws a figure of a study at a path."""
KINDS: dict[str, Draw] = {"planned": draw_comparisons, "strengths": draw_strengths}
"""By the setting that a study's config has, the figure that it gets."""


def figures() -> dict[str, dict[str, Draw]]:
    """By study its figures."""
    drawn = {study: {kind: draw for kind, draw in KINDS.items() if kind in settings_of(study)} for study in STUDIES}
    return {study: kinds for study, kinds in drawn.items() if kinds} | {
        name: {"planned": draw_controls} for name in CONTROLS
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
