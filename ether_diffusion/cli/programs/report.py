"""``ether report RUN …``: one page of many runs, offline and in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.arguments import Parser
from ether_diffusion.first_imports import first_imports
from ether_diffusion.ranges import Range
from ether_diffusion.reading import DamagedFileError


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: write the page and print its path.

    Raises:
        SystemExit: a folder is neither a benchmark's nor a run's, or damaged, or --watch cannot serve it.
    """
    parser = Parser(
        description="One page of many runs, offline and in one file: scores with intervals, by subject and prompt, "
        "pictures, curves."
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN", help="folders of benchmarks, studies of controls, training runs"
    )
    parser.add_argument("--output", type=Path, help="default: report.html in the first folder that is no training run")
    parser.add_argument(
        "--steps",
        type=Path,
        metavar="FILE",
        help="times and memory of a benchmark's methods: what benchmarks/step.py --arms CONFIG --json FILE wrote",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve the page of one training run on this machine, and renew it when the run's files change",
    )
    parser.add_argument(
        "--port", type=Range(0, 65535).of(int), help="of --watch (default: 8765, or a free one where it is taken)"
    )
    given = parser.parse_args(arguments)
    if given.watch and (len(given.folders) > 1 or given.output is not None or given.steps is not None):
        parser.error("--watch serves the page of one training run: give one folder, and no --output or --steps")
    if given.port is not None and not given.watch:
        parser.error("--port is for --watch: add it, or leave --port out")

    with first_imports():
        from ether_diffusion.evaluation.overview import write_report
        from ether_diffusion.evaluation.subjects.costs import StepsError
        from ether_diffusion.runs.watch import watch

    if given.watch:
        try:
            watch(given.folders[0], given.port)
        except (DamagedFileError, OSError) as error:
            parser.error(str(error))
        return
    studies = [folder for folder in given.folders if not (folder / "provenance.json").is_file()]
    output = given.output or (studies[0] if studies else Path.cwd()) / "report.html"
    try:
        print(write_report(given.folders, output, given.steps).resolve())
    except (DamagedFileError, FileNotFoundError, StepsError) as error:
        parser.error(str(error))
