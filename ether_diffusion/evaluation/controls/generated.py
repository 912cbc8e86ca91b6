"""Folders of originals with their conditions, and of what was generated for them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ether_diffusion.control.conditions import load_map
from ether_diffusion.data.pairs import read_listing
from ether_diffusion.evaluation.subjects.folders import METADATA, SUFFIXES
from ether_diffusion.files import write_text
from ether_diffusion.images import check_folder, load_image
from ether_diffusion.metrics.control_tasks import Pair

SAMPLE_LINE = '{"file_name": "0001-0.png", "pair": "images/0001.png", "prompt": "a prompt", "seed": 3}'


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
class Control:
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
    """Write the ``metadata.jsonl`` that :func:`read_control` reads beside generated pictures; return its path."""
    lines = []
    for sample in samples:
        entry: dict[str, Any] = {"file_name": sample.file_name, "pair": sample.pair}
        entry |= {key: getattr(sample, key) for key in ("prompt", "seed") if getattr(sample, key) is not None}
        lines.append(f"{json.dumps(entry, ensure_ascii=False)}\n")
    write_text(folder / METADATA, "".join(lines))
    return folder / METADATA


def read_pairs(folder: Path) -> list[Pair]:
    """The pairs of a folder, as training reads them: see :mod:`ether_diffusion.data.pairs`; files are not opened.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, or no listing in it.
        ValueError: the listing is not what it should be, or names a picture twice.
    """
    listing = read_listing(folder, captions=False)
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
        samples.append(Sample(entry["file_name"], entry["pair"], prompt, seed))
    _check_distinct([sample.file_name for sample in samples], folder)
    return samples


def read_control(data: Path, generated: Path, maps: bool) -> Control:
    """Which pictures belong to which pair; every file that is named is opened once, in full.

    Refused are: pictures that no line of the metadata names, lines whose pair the data does not have, pairs without
    pictures, and files that are not there or cannot be read, with all that needs them.

    Args:
        data: folder of originals and conditions.
        generated: folder of generated pictures.
        maps: whether conditions are semantic maps.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder or its metadata is missing.
        ValueError: metadata is not what it should be, or nothing is left to score.
    """
    pairs, samples = {pair.name: pair for pair in read_pairs(data)}, read_samples(generated)
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
    return Control([usable[name] for name in kept], [of_pairs[name] for name in kept], refused)


def _lines(path: Path, expected: str, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a line for every picture is expected, such as {expected}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: {expected} is expected, not {line[:80]}") from error
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
            raise ValueError(f"{where}: {expected} is expected, not {line[:80]}")
        yield where, entry


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
