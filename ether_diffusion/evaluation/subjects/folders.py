"""Scores of images that exist already, whoever made them: folders of generated images against folders of real ones."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ether_diffusion.evaluation.tables import write_tables
from ether_diffusion.files import write_text
from ether_diffusion.images import UnreadableImageError, check_folder, load_image
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

    Every other file that is neither hidden nor a text is refused with its reason; so is a folder in it with pictures,
    and a line of the metadata without its file.

    Raises:
        ValueError: the metadata is not what it should be.
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    prompts = _prompts(check_folder(folder) / METADATA)
    found = Pictures([], [])
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith(".") or path.suffix.lower() in (".txt", ".json", ".jsonl"):
            continue
        if path.is_dir():
            if _has_pictures(path):
                found.refused[str(path)] = "a folder inside of a subject's, which is not searched"
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


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())


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

    Folders inside are paired by equal names: ``dog`` is not ``backpack_dog``. Two folders of pictures alone are one
    subject.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: no name is in both, and they are not both folders of pictures.
    """
    both = [check_folder(generated), check_folder(references)]
    mine, theirs = ({path.name: path for path in sorted(folder.iterdir()) if path.is_dir()} for folder in both)
    pairs = {name: (mine[name], theirs[name]) for name in mine if name in theirs}
    if not pairs:
        if all(map(_has_pictures, both)):
            return {references.resolve().name: (generated, references)}, {}
        names = f"{', '.join(mine) or 'none'}; {', '.join(theirs) or 'none'}"
        raise ValueError(
            f"{generated} and {references} are neither two folders of pictures nor two of folders with the same names "
            f"(theirs are: {names})"
        )
    lonely = {
        str(path): f"{references} has no folder of that name" for name, path in mine.items() if name not in theirs
    }
    lonely |= {
        str(path): f"{generated} has no folder of that name" for name, path in theirs.items() if name not in mine
    }
    strays = [path for folder in both for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    return pairs, lonely | {str(path): "a picture beside the subjects' folders" for path in strays}


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
