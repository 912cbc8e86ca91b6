"""A benchmark's rows in one small file, and rows of such a file run again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.arguments import Parser
from ether_diffusion.first_imports import first_imports
from ether_diffusion.ranges import SEED
from ether_diffusion.reading import DamagedFileError


def table(arguments: Sequence[str] | None = None) -> None:
    """Write the file of a folder: of a benchmark, or of a study of controls.

    Raises:
        SystemExit: the folder has no results, or one of its files is damaged.
    """
    parser = Parser(description="All scores and settings of a study in one small file, to commit and compare with.")
    parser.add_argument("folder", type=Path, help="of a benchmark or a study of controls, such as runs/playground")
    parser.add_argument("file", type=Path, help="the JSON file to write")
    given = parser.parse_args(arguments)
    with first_imports():
        from ether_diffusion.evaluation.controls.compact import write_rows
        from ether_diffusion.evaluation.controls.findings import OUTLINE, read_findings
        from ether_diffusion.evaluation.subjects.compact import in_order, settings_in, write_compact
        from ether_diffusion.evaluation.subjects.summary import all_results
    try:
        if (given.folder / OUTLINE).is_file():
            findings = read_findings(given.folder)
            if not findings.finished:
                parser.error(f"{given.folder}: nothing can be compared yet: {'; '.join(findings.left_out)}")
            jobs = write_rows(given.file, findings)
        else:
            results = in_order(all_results(given.folder), given.folder)
            if not results:
                parser.error(f"{given.folder} has no results: name the output_dir of a study that has run")
            write_compact(given.file, results, settings_in(given.folder))
            jobs = len(results)
    except (DamagedFileError, OSError) as error:
        parser.error(str(error))
    print(f"{given.file}: {jobs} jobs, {given.file.stat().st_size / 1e6:.2f} MB")


def reproduce(arguments: Sequence[str] | None = None) -> None:
    """Run rows again; it ends with 1 where one does not agree.

    ``ether study reproduce docs/results/playground.json --arms ether_plus --seeds 0 --output_dir runs/again`` runs one
    row with one seed; without ``--arms`` and ``--seeds`` all of it.

    Raises:
        SystemExit: the file is not there, has no such row, or a row does not agree.
    """
    parser = Parser(
        description="Run rows of a committed table again, and say whether they agree with it, picture by picture."
    )
    parser.add_argument("table", type=Path, help="the file of the rows, such as docs/results/playground.json")
    parser.add_argument("--output_dir", type=Path, required=True, help="where to run; what is done there is kept")
    parser.add_argument("--arms", nargs="+", default=[], help="methods to run again, or base for the anchors alone")
    parser.add_argument("--subjects", nargs="+", default=[], help="default: all of the file")
    parser.add_argument("--seeds", nargs="+", type=SEED.of(int), default=[], help="default: all of the file")
    parser.add_argument("--protocol", help="YAML file of the subjects, where the file's protocol was one")
    parser.add_argument("--data_dir", type=Path, help="photos of the protocol dreambooth")
    parser.add_argument("--base", help="where the base lies, if its name in the file is not where it is here")
    for judge in ("dino", "clip", "lpips"):
        parser.add_argument(f"--{judge}", help=f"likewise the judge {judge}")
    given = vars(parser.parse_args(arguments))
    with first_imports():
        from ether_diffusion.evaluation.subjects.against import read_rows
        from ether_diffusion.evaluation.subjects.reproduce import DIFFERS, Again, config_of, reproduce
    try:
        rows = read_rows(given.pop("table"))
        config = config_of(rows, Again(**given))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if any(row.verdict == DIFFERS for row in reproduce(config, rows)):
        raise SystemExit(1)
