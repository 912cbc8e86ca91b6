"""``ether votes FILE …``: which column readers of a comparison's page chose in the blind mode, with intervals.

The files are those that the page saves, of one comparison, one from each reader. The unit is the prompt: what readers
chose for the seeds of a prompt is averaged first. A row without a preference counts for all columns in equal parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.arguments import Parser
from ether_diffusion.first_imports import first_imports
from ether_diffusion.reading import DamagedFileError


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of the files that are named.

    Raises:
        SystemExit: a file is not what a page saves, or they are of several comparisons.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="votes-….json of each reader")
    given = parser.parse_args(arguments)
    with first_imports():
        from ether_diffusion.evaluation.compare.votes import read_votes, votes_table
    try:
        print(votes_table([read_votes(path) for path in given.files]))
    except (DamagedFileError, OSError, ValueError) as error:
        parser.error(str(error))
