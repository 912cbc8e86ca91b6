"""How often intervals of a mean over few subjects hold the true mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.arguments import Parser
from ether_diffusion.first_imports import first_imports
from ether_diffusion.ranges import COUNT, SEED


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: simulate, print the table, write it."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--rounds", type=COUNT.of(int), default=4000, help="data sets per column (default: %(default)s)"
    )
    parser.add_argument("--seed", type=SEED.of(int), default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    given = parser.parse_args(arguments)
    with first_imports():
        from ether_diffusion.evaluation.statistics import study_coverage
    print(study_coverage(given.rounds, given.seed, given.output_dir))
