"""Scores of images that exist already, whoever made them: folders of generated images against folders of real ones."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ether_diffusion.data.images import UnreadableImageError, check_folder, load_image
from ether_diffusion.evaluation.summary import write_tables
from ether_diffusion.metrics.judges import add_judges, judges_of
from ether_diffusion.metrics.scoring import Judges, References, score_images

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"
"""Beside images: a line ``{"file_name": …, "prompt": …}`` for each (``text`` does as well)."""


@dataclass
class Pictures:
    """The pictures of a folder, by name; ``refused``: what was passed over, and why."""

    paths: list[Path]
    prompts: list[str | None]
    refused: dict[str, str] = field(default_factory=dict)


def read_pictures(folder: Path) -> Pictures:
    """The pictures directly in ``folder``, sorted by name, with their prompts where ``metadata.jsonl`` has them.

    Every file that is no whole picture is refused with its reason, and so is a line of the metadata without its file.

    Raises:
        ValueError: the metadata is not what it should be.
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    prompts = _prompts(check_folder(folder) / METADATA)
    found = Pictures([], [])
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_dir() or path.name == METADATA or path.suffix.lower() in (".txt", ".json", ".jsonl"):
            continue
        try:
            load_image(path)
        except (UnreadableImageError, OSError) as error:
            found.refused[str(path)] = str(error)
            continue
        found.paths.append(path)
        found.prompts.append(prompts.pop(path.name, None))
    found.refused |= {str(folder / name): f"named in {METADATA}, but not there" for name in prompts}
    return found


def _prompts(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    prompts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            prompts[str(entry["file_name"])] = str(entry["prompt"] if "prompt" in entry else entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: {{"file_name": …, "prompt": …}} is expected, not {line[:80]}'
            ) from error
    return prompts


def pair_folders(generated: Path, references: Path) -> tuple[dict[str, tuple[Path, Path]], dict[str, str]]:
    """Which generated folder belongs to which references, by the subject's name, and what has no counterpart.

    Two folders with pictures in them are one subject. Two folders of folders are paired by equal names: ``dog`` is not
    ``backpack_dog``.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: one of them holds pictures, the other folders; or no name is in both.
    """
    inside = [
        {path.name: path for path in sorted(check_folder(folder).iterdir()) if path.is_dir()}
        for folder in (generated, references)
    ]
    flat = [any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()) for folder in (generated, references)]
    if all(flat):
        return {references.name: (generated, references)}, {}
    if any(flat):
        holder, other = (generated, references) if flat[0] else (references, generated)
        raise ValueError(f"{holder} holds pictures and {other} folders: give two of one kind")
    mine, theirs = inside
    pairs = {name: (mine[name], theirs[name]) for name in mine if name in theirs}
    if not pairs:
        raise ValueError(f"no folder in {generated} ({', '.join(mine)}) has the name of one in {references}")
    lonely = {
        str(path): f"{references} has no folder of that name" for name, path in mine.items() if name not in theirs
    }
    lonely |= {
        str(path): f"{generated} has no folder of that name" for name, path in theirs.items() if name not in mine
    }
    return pairs, lonely


def score_folders(
    generated: Path, references: Path, judges: Judges, output_dir: Path, token: str | None = None
) -> tuple[str, dict[str, str]]:
    """Score every subject and write ``scores.jsonl``, ``summary.json`` and ``summary.md`` into ``output_dir``.

    Returns:
        The table, and what was not scored: from path to reason.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: nothing can be scored; the message says why.
    """
    pairs, refused = pair_folders(generated, references)
    results: list[dict[str, Any]] = []
    for name, (mine, theirs) in pairs.items():
        pictures, real = read_pictures(mine), read_pictures(theirs)
        refused |= pictures.refused | real.refused
        if not pictures.paths or not real.paths:
            refused[str(mine if not pictures.paths else theirs)] = "no readable picture"
            continue
        known = References(real.paths, judges)
        scored = score_images(pictures.paths, pictures.prompts, known, judges, token, show=True)
        rows = [{"file": path.name} | row for path, row in zip(pictures.paths, scored.images, strict=True)]
        results.append(
            {
                **{"arm": generated.name, "learning_rate": None, "subject": name, "seed": 0},
                **{"judges": judges.identity, "references": [path.name for path in real.paths]},
                **{"real": known.among(judges), "images": rows, "prompts": scored.prompts},
            }
        )
    if not results:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in refused.items())
        raise ValueError(f"nothing to score in {generated}: {reasons}")
    return write_tables(output_dir, results, [f"{path}: {reason}" for path, reason in refused.items()]), refused


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: score two folders, print the table, and name what was not scored.

    Raises:
        SystemExit: 1 if something was not scored, 2 if nothing could be.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m eval.subject_fidelity",
        description="DINO, CLIP-I, CLIP-T, LPIPS and DIV of generated images against a subject's own.",
    )
    parser.add_argument("--generated", type=Path, required=True, help="images, or a folder of them for each subject")
    parser.add_argument("--references", type=Path, required=True, help="likewise, under the same names")
    parser.add_argument("--output_dir", type=Path, help="default: beside the generated folder, with -scores added")
    parser.add_argument("--token", help="the rare word of the prompts, such as qwe")
    add_judges(parser)
    given = parser.parse_args(arguments)
    output_dir = given.output_dir or given.generated.with_name(f"{given.generated.name}-scores")
    try:
        pair_folders(given.generated, given.references)  # a wrong path shows before the judges are loaded
        table, refused = score_folders(given.generated, given.references, judges_of(given), output_dir, given.token)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{table}\nscores of every image and pair: {output_dir / 'scores.jsonl'}")
    if refused:
        print(f"not scored ({len(refused)}):", *(f"  {path}: {reason}" for path, reason in refused.items()), sep="\n")
        raise SystemExit(1)
