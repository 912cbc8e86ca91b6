"""The figures of planned comparisons in the docs, from the committed rows of every picture and the studies' configs.

``python docs/study_pictures.py`` writes ``docs/pictures/planned-STUDY.png`` of every study whose config names
comparisons; with names of studies, of these alone.
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

from ether_diffusion.evaluation.subjects.planned import draw_planned


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


if __name__ == "__main__":
    main()
