"""The figures of studies in the docs, from the committed rows of every picture and the studies' configs.

``python docs/study_pictures.py`` writes ``docs/pictures/planned-STUDY.png`` of every study whose config names
comparisons, and ``strengths-STUDY.png`` of every one that drew at several strengths; with names of studies, of these
alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from study_tables import STUDIES, TRUTH, points_by_strength, results_of, settings_of

from ether_diffusion.evaluation.figures import Line, Panel, write_figure
from ether_diffusion.evaluation.subjects.planned import draw_planned
from ether_diffusion.evaluation.subjects.summary import BY_KEY

TENFOLD = "_tenfold"
"""What names of arms at ten times their rate end with."""
CLIP_T = BY_KEY["clip_t"]


def draw_strengths(study: str, path: Path) -> None:
    """Draw the score that decides against CLIP-T, a line through each method's strengths."""
    titles = {False: "at the tuned rate", True: "at ten times the rate"}
    panels = {tenfold: Panel(f"{TRUTH.title}, {title}", CLIP_T.title) for tenfold, title in titles.items()}
    arms: dict[str, list[tuple[float, float]]] = {}
    for point in points_by_strength(study):
        scores = point.row["scores"]
        arms.setdefault(point.row["arm"], []).append((scores["clip_t"]["mean"], scores[TRUTH.key]["mean"]))
    for arm, places in arms.items():
        x, y = zip(*places, strict=True)
        panels[arm.endswith(TENFOLD)].lines.append(Line(arm.removesuffix(TENFOLD), x, y))
    shown = [panel for panel in panels.values() if panel.lines]
    told = "Means over subjects. A line goes through the strengths, from the least to 1; a single point is strength 1."
    write_figure(path, shown, share_y=True, caption=[told])


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
        if settings.get("strengths"):
            path = DOCS / "pictures" / f"strengths-{name}.png"
            draw_strengths(name, path)
            print(path)


if __name__ == "__main__":
    main()
