"""Folders of pictures to be scored: of a subject, of subjects side by side, and what was generated for pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ether_diffusion.control.conditions import load_map
from ether_diffusion.data.metadata import check_inside, read_rows
from ether_diffusion.data.pairs import read_listing
from ether_diffusion.files import write_text
from ether_diffusion.images import UnreadableImageError, check_folder, load_image
from ether_diffusion.metrics.control_tasks import Pair

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"
"""Beside images: a line ``{"file_name": …, "prompt": …}`` for each (``text`` does as well)."""
SAMPLE_LINE = '{"file_name": "0001-0.png", "pair": "images/0001.png", "prompt": "a prompt", "seed": 3}'


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
    if not path.exists():
        return {}
    prompts = {}
    expected = '{"file_name": …, "prompt": …}'
    for row in read_rows(path, expected):
        try:
            entry = row.values
            prompts[str(entry["file_name"])] = str(entry["prompt"] if "prompt" in entry else entry["text"])
        except KeyError as error:
            raise ValueError(f"{row.where}: {expected} is expected, not {row.text[:80]}") from error
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


@dataclass(frozen=True)
class Sample:
    """A generated picture.

    Attributes:
        file_name: its path in the folder of generated pictures.
        pair: the name of its pair: the original's path in the data's folder.
        prompt: that it was generated for.
        seed: of its noise.
    """

    file_name: str
    pair: str
    prompt: str | None = None
    seed: int | None = None


@dataclass
class Generated:
    """What can be scored, and what cannot.

    Attributes:
        pairs: that have pictures, in the order of the data.
        samples: of each of them its pictures, in the order of their metadata.
        refused: from a path to why it is not scored.
    """

    pairs: list[Pair]
    samples: list[list[Sample]]
    refused: dict[str, str] = field(default_factory=dict)


def write_generated_metadata(folder: Path, samples: Iterable[Sample]) -> Path:
    """Write the ``metadata.jsonl`` that :func:`read_generated` reads beside generated pictures; return its path."""
    lines = []
    for sample in samples:
        entry: dict[str, Any] = {"file_name": sample.file_name, "pair": sample.pair}
        entry |= {key: getattr(sample, key) for key in ("prompt", "seed") if getattr(sample, key) is not None}
        lines.append(f"{json.dumps(entry, ensure_ascii=False)}\n")
    write_text(folder / METADATA, "".join(lines))
    return folder / METADATA


def read_pairs(folder: Path, allow_outside_paths: bool = False) -> list[Pair]:
    """The pairs of a folder, as training reads them: see :mod:`ether_diffusion.data.pairs`; files are not opened.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, or no listing in it.
        ValueError: the listing is not what it should be, or names a picture twice.
    """
    listing = read_listing(folder, captions=False, allow_outside_paths=allow_outside_paths)
    pairs = [Pair(entry.name, entry.image, entry.condition, entry.prompt or None) for entry in listing]
    _check_distinct([pair.name for pair in pairs], folder)
    return pairs


def read_samples(folder: Path) -> list[Sample]:
    """The lines of ``metadata.jsonl`` beside generated pictures; files are not opened.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, or no metadata in it.
        ValueError: the metadata is not what it should be, or names a picture twice.
    """
    samples = []
    for where, entry in _lines(check_folder(folder) / METADATA, SAMPLE_LINE, ("file_name", "pair")):
        prompt, seed = entry.get("prompt", entry.get("text")), entry.get("seed")
        if not isinstance(prompt, str | None) or not isinstance(seed, int | None):
            raise ValueError(f"{where}: the prompt is a string and the seed a whole number, as in {SAMPLE_LINE}")
        check_inside(entry["file_name"], where)
        samples.append(Sample(entry["file_name"], entry["pair"], prompt, seed))
    _check_distinct([sample.file_name for sample in samples], folder)
    return samples


def read_generated(data: Path, generated: Path, maps: bool, allow_outside_paths: bool = False) -> Generated:
    """Which pictures belong to which pair; every file that is named is opened once, in full.

    Refused are: pictures that no line of the metadata names, lines whose pair the data does not have, pairs without
    pictures, and files that are not there or cannot be read, with all that needs them.

    Args:
        data: folder of originals and conditions.
        generated: folder of generated pictures.
        maps: whether conditions are semantic maps.
        allow_outside_paths: whether the data may name files outside of their folder.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder or its metadata is missing.
        ValueError: metadata is not what it should be, or nothing is left to score.
    """
    pairs, samples = {pair.name: pair for pair in read_pairs(data, allow_outside_paths)}, read_samples(generated)
    refused = _strays(generated, samples)
    usable: dict[str, Pair] = {}
    for pair in pairs.values():
        faults = _pair_faults(pair, maps)
        refused |= faults
        if not faults:
            usable[pair.name] = pair
    of_pairs: dict[str, list[Sample]] = {name: [] for name in usable}
    for sample in samples:
        path = generated / sample.file_name
        if sample.pair not in pairs:
            refused[str(path)] = f"its pair {sample.pair} is not in {data / METADATA}"
        elif sample.pair not in usable:
            refused[str(path)] = f"its pair {sample.pair} cannot be read"
        elif (fault := _fault(path, load_image)) is not None:
            refused[str(path)] = fault
        else:
            of_pairs[sample.pair].append(sample)
    refused |= {str(usable[name].original): "no generated picture" for name, found in of_pairs.items() if not found}
    most = max(map(len, of_pairs.values()), default=0)
    refused |= {
        str(usable[name].original): f"{len(found)} generated pictures, others have {most}"
        for name, found in of_pairs.items()
        if 0 < len(found) < most
    }
    kept = [name for name, found in of_pairs.items() if found]
    if not kept:
        why = "; ".join(f"{path}: {reason}" for path, reason in refused.items())
        raise ValueError(f"nothing to score in {generated}: {why or 'it names no pictures'}")
    return Generated([usable[name] for name in kept], [of_pairs[name] for name in kept], refused)


def _lines(path: Path, expected: str, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: a line for every picture is expected, such as {expected}")
    for row in read_rows(path, expected):
        if not all(isinstance(row.values.get(key), str) for key in keys):
            raise ValueError(f"{row.where}: {expected} is expected, not {row.text[:80]}")
        yield row.where, row.values


def _check_distinct(names: list[str], folder: Path) -> None:
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"{folder / METADATA} names {', '.join(twice[:8])} more than once")


def _strays(folder: Path, samples: list[Sample]) -> dict[str, str]:
    known = {(folder / sample.file_name).resolve() for sample in samples}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    strays = [path for path in paths if path.resolve() not in known and not path.name.startswith(".")]
    return {str(path): f"no line of {METADATA} says which pair it belongs to" for path in strays}


def _pair_faults(pair: Pair, maps: bool) -> dict[str, str]:
    """What of the pair cannot be read, and why."""
    faults = {}
    wanted: list[tuple[Any, Callable[[Path], object]]] = [(pair.original, load_image)]
    wanted.append((pair.condition, load_map if maps else load_image))
    for path, load in wanted:
        if isinstance(path, Path) and (fault := _fault(path, load)) is not None:
            faults[str(path)] = fault
    return faults


def _fault(path: Path, load: Callable[[Path], object]) -> str | None:
    try:
        load(path)
    except FileNotFoundError:
        return f"named in {METADATA}, but not there"
    except (ValueError, OSError) as error:
        return str(error)
    return None
