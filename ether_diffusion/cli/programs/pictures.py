"""A benchmark's pictures on one sheet, and the scores of pictures of a subject that exist already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.arguments import Parser
from ether_diffusion.first_imports import first_imports
from ether_diffusion.logs import show_study_logs
from ether_diffusion.metrics.asked import add_judges, judges_of
from ether_diffusion.ranges import AMOUNT


def sheet(arguments: Sequence[str] | None = None) -> None:
    """Write the sheet of the benchmark named on the command line.

    Raises:
        SystemExit: it is no benchmark, or has no such subject or prompt.
    """
    parser = Parser(description="One picture of a benchmark.")
    parser.add_argument("folder", type=Path, help="the benchmark's folder, such as runs/playground")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    parser.add_argument("--subjects", nargs="*", default=[], help="default: all")
    parser.add_argument("--prompt", type=AMOUNT.of(int), default=0, help="number of the prompt that is shown")
    given = parser.parse_args(arguments)
    with first_imports():
        from ether_diffusion.evaluation.subjects.sheet import draw_sheet
        from ether_diffusion.page.pictures import save_picture
    try:
        save_picture(draw_sheet(given.folder, given.subjects, given.prompt), given.picture)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(given.picture)


def subject_fidelity(arguments: Sequence[str] | None = None) -> None:
    """Score two folders, print the table, and name what was not scored.

    Raises:
        SystemExit: 1 if something was not scored, 2 if nothing could be.
    """
    show_study_logs()
    parser = Parser(
        description="DINO, CLIP-I, CLIP-T, LPIPS and DIV of generated images against a subject's own.",
    )
    parser.add_argument("--generated", type=Path, required=True, help="images, or a folder of them for each subject")
    parser.add_argument("--references", type=Path, required=True, help="likewise, under the same names")
    parser.add_argument("--output_dir", type=Path, help="default: beside the generated folder, with -scores added")
    parser.add_argument("--token", help="the rare word of the prompts, such as qwe")
    add_judges(parser)
    given = parser.parse_args(arguments)
    generated = given.generated.resolve()
    output_dir = given.output_dir or generated.with_name(f"{generated.name}-scores")
    with first_imports():
        from ether_diffusion.evaluation.subjects.folders import score_folders
        from ether_diffusion.metrics.generated import pair_folders
    try:
        pair_folders(given.generated, given.references)  # a wrong path shows before the judges are loaded
        scores, refused = score_folders(given.generated, given.references, judges_of(given), output_dir, given.token)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{scores}\nscores of every image and pair: {output_dir / 'scores.jsonl'}")
    if refused:
        raise SystemExit(1)
