"""Scores of images that exist already, whoever made them: folders of generated images against folders of real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.arguments import Parser
from ether_diffusion.evaluation.tables import write_tables
from ether_diffusion.files import write_text
from ether_diffusion.logs import show_study_logs
from ether_diffusion.metrics.generated import pair_folders, read_pictures
from ether_diffusion.metrics.judges import add_judges, judges_of
from ether_diffusion.metrics.scoring import Judges, References, score_images


def score_folders(
    generated: Path, references: Path, judges: Judges, output_dir: Path, token: str | None = None
) -> tuple[str, dict[str, str]]:
    """Score every subject and write the tables of :func:`write_tables` and ``results/`` into ``output_dir``.

    Returns:
        The table, and what was not scored: from path to reason.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: nothing can be scored, or metadata is not what it should be; the message says why.
    """
    pairs, refused = pair_folders(generated, references)
    found = {name: (read_pictures(mine), read_pictures(theirs)) for name, (mine, theirs) in pairs.items()}
    results: list[dict[str, Any]] = []
    for name, (pictures, real) in found.items():
        refused |= pictures.refused | real.refused
        if not pictures.paths or not real.paths:
            refused[str(pairs[name][0 if not pictures.paths else 1])] = "no readable picture"
            continue
        known = References(real.paths, judges)
        scored = score_images(pictures.paths, pictures.prompts, known, judges, token, show=True)
        rows = [{"file": path.name} | row for path, row in zip(pictures.paths, scored.images, strict=True)]
        results.append(
            {
                **{"arm": generated.resolve().name, "learning_rate": None, "subject": name, "seed": 0},
                **{"judges": judges.identity, "references": [str(path.resolve()) for path in real.paths]},
                **{"folder": str(pairs[name][0].resolve()), "real": known.among(judges)},
                **{"images": rows, "prompts": scored.prompts},
            }
        )
    if not results:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in refused.items())
        raise ValueError(f"nothing to score in {generated}: {reasons}")
    for result in results:
        write_text(output_dir / "results" / f"{result['subject']}.json", json.dumps(result))
    return write_tables(output_dir, results, [f"{path}: {reason}" for path, reason in refused.items()]), refused


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: score two folders, print the table, and name what was not scored.

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
    try:
        pair_folders(given.generated, given.references)  # a wrong path shows before the judges are loaded
        table, refused = score_folders(given.generated, given.references, judges_of(given), output_dir, given.token)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{table}\nscores of every image and pair: {output_dir / 'scores.jsonl'}")
    if refused:
        raise SystemExit(1)
