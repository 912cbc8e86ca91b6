"""The figures of studies in the docs, from the committed rows of every picture and the studies' configs.

``python docs/study_pictures.py`` writes ``docs/pictures/planned-STUDY.png`` of every study whose config names
comparisons, and the strengths of the flow base's study; with names of studies, of these alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from study_tables import STUDIES, TRUTH, results_of, settings_of

from ether_diffusion.evaluation.figures import Line, Panel, write_figure
from ether_diffusion.evaluation.subjects.planned import draw_planned
from ether_diffusion.evaluation.subjects.summary import BY_KEY, strength_points

FLOW, TENFOLD = "playground-flow", "_tenfold"
"""The study that drew at several strengths, and what its arms at ten times their rate end with."""
CLIP_T = BY_KEY["clip_t"]


def draw_strengths(path: Path) -> None:
    """Draw the score that decides against CLIP-T in the study of the flow base: a line through a method's strengths."""
    titles = {False: "at the tuned rate", True: "at ten times the rate"}
    panels = {tenfold: Panel(f"{TRUTH.title}, {title}", CLIP_T.title) for tenfold, title in titles.items()}
    arms: dict[str, list[tuple[float, float]]] = {}
    for point in strength_points(results_of(FLOW)):
        scores = point.row["scores"]
        arms.setdefault(point.row["arm"], []).append((scores["clip_t"]["mean"], scores[TRUTH.key]["mean"]))
    for arm, places in arms.items():
        x, y = zip(*places, strict=True)
        panels[arm.endswith(TENFOLD)].lines.append(Line(arm.removesuffix(TENFOLD), x, y))
    told = "Means over subjects. Lines: strengths .5, .75, 1 (of free they coincide). Single points: strength 1."
    write_figure(path, list(panels.values()), share_y=True, caption=[told])


def main() -> None:
    """Draw the figures."""
    drawn = [name for name in STUDIES if "planned" in settings_of(name)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=drawn, metavar="STUDY", help=f"of {', '.join(drawn)}")
    asked: list[str] = parser.parse_args().studies
    if unknown := sorted(set(asked) - set(drawn)):
        parser.error(f"no planned comparisons of {', '.join(unknown)}; there are {', '.join(drawn)}")
    for name in asked:
        settings, path = settings_of(name), DOCS / "pictures" / f"planned-{name}.png"
        draw_planned(path, results_of(name), settings["planned"], settings.get("secondary", {}), TRUTH)
        print(path)
        if name == FLOW:
            path = DOCS / "pictures" / f"strengths-{name}.png"
            draw_strengths(path)
            print(path)


if __name__ == "__main__":
    main()
