"""Scores of images that exist already, whoever made them: folders of generated images against folders of real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ether_diffusion.evaluation.tables import write_tables
from ether_diffusion.files import write_text
from ether_diffusion.metrics.generated import pair_folders, read_pictures
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
