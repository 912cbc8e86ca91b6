"""Changed files for every reader: each is read, or refused with the one documented error.

``python tests/fuzz.py --files 20000`` runs long, under a memory limit, and keeps what fails in a folder;
``tests/test_fuzz.py`` runs a small part of the same. File n of a reader depends on the seed, the reader and n alone.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from corpus import make
from families.tiny import flux2_transformer
from PIL import Image

from ether_diffusion import AdapterFileError
from ether_diffusion.control.conditions import load_condition
from ether_diffusion.data.captions import list_pictures, prompts_of
from ether_diffusion.data.options import FolderOptions
from ether_diffusion.data.pairs import FolderPairs, read_listing
from ether_diffusion.images import UnreadableImageError, load_image
from ether_diffusion.pipelines.file import AdapterFile
from ether_diffusion.pipelines.fitting import fit
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.runs.record import RunRecordError, read_run
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

SECONDS, MEMORY = 5.0, 2 * 2**30
"""Limits of one file and of the process."""
MESSAGE = 5000
"""Characters of an error that a user can still read."""

WORDS: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 2**70, 10**400, 0.5, -0.0, float("nan"), float("inf"), "", "0",
    "no", "4", "a" * 5000, "../a.png", "/etc/hostname", "a\u2028b", "\ud800", "\x00", "\x1b[2J", [], {}, [[]], [1, "a"],
    {"a": {}}, "unet", "ether", "naive", "ether_plus", "F16", "I64", "F8_E4M3", "attention", "mlp", "*", "[z-a]", "map",
]  # fmt: skip


class TooSlow(BaseException):
    """A file took longer than it may; no reader can catch it."""


@dataclass(frozen=True)
class Reader:
    """One reader under test.

    Attributes:
        make: write changed file ``n`` into a folder; returns the path that an error must name and whether its first
            parse (header, JSON, YAML) succeeds.
        read: read what was written.
        error: the documented error.
    """

    make: Callable[[Path, random.Random], tuple[Path, bool]]
    read: Callable[[Path], object]
    error: type[BaseException]
    names_file: bool = True


def mutate(value: Any, rng: random.Random) -> Any:
    """Change a few places of a JSON value: another value, a key less, a key more, a place twice."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            return rng.choice(WORDS)
        parent, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice((str(key) + "x", str(rng.choice(WORDS))[:600]))] = parent[key]
            case 2:
                parent[key] = copy.deepcopy(rng.choice(places)[0]) if len(json.dumps(value)) < 20_000 else 0
            case 3 if isinstance(parent[key], int) and not isinstance(parent[key], bool):
                parent[key] += rng.choice((-1, 1, 2**32))
            case _:
                parent[key] = copy.deepcopy(rng.choice(WORDS))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key of it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def flip(content: bytes, rng: random.Random) -> bytes:
    """Change a few bytes, or cut the file."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.2 else changed)


def _parses(parse: Callable[[], object]) -> bool:
    try:
        parse()
    except Exception:  # noqa: BLE001 whatever a parser raises
        return False
    return True


def changed_adapter(folder: Path, rng: random.Random) -> tuple[Path, bool]:
    """An adapter whose header, or a part of its metadata, is changed as JSON; now and then as bytes."""
    header = rng.choice((make.adapter_header, make.adapter_header, make.fused_header))()
    metadata = header["__metadata__"]
    if rng.random() < 0.2:
        shape = {"out_channels": 32, "channels": [16, 32], "condition": "image"}
        metadata["control_encoder"] = json.dumps(mutate(shape, rng))
    match rng.randrange(5):
        case 0 | 1:
            part = rng.choice(("ether_config", "ether_config", "base_hash"))
            metadata[part] = json.dumps(mutate(json.loads(metadata[part]), rng))
            content = make.adapter(header)
        case 4:
            content = flip(make.adapter(header), rng)
        case _:
            content = make.adapter(mutate(header, rng))
    path = folder / "a.safetensors"
    path.write_bytes(content)
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0
    return path, _parses(lambda: json.loads(content[8 : 8 + min(length, len(content))]))


def changed_config(folder: Path, rng: random.Random) -> tuple[Path, bool]:
    """Settings changed as values; now and then as text."""
    settings = mutate(make.SETTINGS, rng)
    text = json.dumps(settings) if rng.random() < 0.3 else yaml.safe_dump(settings, allow_unicode=rng.random() < 0.5)
    content = text.encode("utf-8", "surrogatepass")
    path = folder / "a.yaml"
    path.write_bytes(flip(content, rng) if rng.random() < 0.2 else content)
    return path, _parses(lambda: yaml.safe_load(path.read_bytes()))


def changed_listing(folder: Path, rng: random.Random) -> tuple[Path, bool]:
    """Lines changed as JSON; now and then as bytes. The pictures that they name are there."""
    for name in ("a.png", "b.png"):
        if not (folder / name).exists():
            (folder / name).write_bytes(make.picture("RGB", "PNG"))
    rows = [mutate(row, rng) if rng.random() < 0.6 else row for row in make.ROWS]
    text = rng.choice(("\n", "\r\n", "\u2028")).join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows)
    content = text.encode("utf-8", "surrogatepass")
    path = folder / "metadata.jsonl"
    path.write_bytes(flip(content, rng) if rng.random() < 0.2 else content)
    return path, _parses(lambda: json.loads(path.read_bytes().splitlines()[0]))


def changed_metadata(folder: Path, rng: random.Random) -> tuple[Path, bool]:
    """The captions of a folder of pictures, in either format: rows changed as values; now and then as bytes."""
    for name in ("metadata.csv", "metadata.jsonl"):
        (folder / name).unlink(missing_ok=True)
    if rng.random() < 0.5:
        return changed_listing(folder, rng)
    for name in ("a.png", "b.png"):
        if not (folder / name).exists():
            (folder / name).write_bytes(make.picture("RGB", "PNG"))
    rows = [mutate(row, rng) if rng.random() < 0.6 else row for row in make.ROWS]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=rng.choice(",,,,;\t"), lineterminator=rng.choice(("\n", "\r\n", "\r")))
    columns = list(make.ROWS[0])
    header = mutate(columns, rng) if rng.random() < 0.3 else columns
    for row in (header, *rows):
        writer.writerow(row.values() if isinstance(row, dict) else row if isinstance(row, list) else [row])
    content = text.getvalue().encode("utf-8-sig" if rng.random() < 0.2 else "utf-8", "surrogatepass")
    path = folder / "metadata.csv"
    path.write_bytes(flip(content, rng) if rng.random() < 0.2 else content)
    return path, _parses(lambda: list(csv.reader(io.StringIO(path.read_text("utf-8-sig"), newline=""), strict=True)))


PICTURES = make.whole()["picture"]


def changed_picture(folder: Path, rng: random.Random) -> tuple[Path, bool]:
    """A picture with bytes changed behind its first 40; a PNG with chunks changed, checksums right."""
    name = rng.choice(list(PICTURES))
    content = PICTURES[name]
    if name.endswith(".png") and rng.random() < 0.7:
        content = _changed_png(content, rng)
    elif rng.random() < 0.9:
        content = content[:40] + flip(content[40:], rng)
    else:
        content = flip(content, rng)
    path = folder / f"picture{Path(name).suffix}"
    path.write_bytes(content)
    return path, _parses(lambda: Image.open(path).close())


def _changed_png(content: bytes, rng: random.Random) -> bytes:
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += length + 12
    place = rng.randrange(len(chunks))
    kind, data = chunks[place]
    match rng.randrange(5):
        case 0:
            sides = [rng.choice((1, 24, 32, 2**10, 2**14, 2**20, 2**31 - 1)) for _ in range(2)]
            chunks[0] = (b"IHDR", struct.pack(">II", *sides) + chunks[0][1][8:])
        case 1:
            chunks.insert(rng.randrange(1, len(chunks)), rng.choice(chunks[1:]))
        case 2 if place:
            del chunks[place]
        case 3:
            extra = rng.choice((b"tRNS", b"eXIf", b"iCCP", b"zTXt", b"iTXt", b"gAMA", b"PLTE", b"acTL", b"fdAT"))
            chunks.insert(rng.randrange(1, len(chunks)), (extra, rng.randbytes(rng.choice((0, 1, 6, 300)))))
        case _:
            chunks[place] = (kind, flip(data, rng))
    return content[:8] + b"".join(make.chunk(kind, data) for kind, data in chunks)


def changed_record(folder: Path, rng: random.Random) -> tuple[Path, bool]:
    """A run folder of which one file is changed."""
    whole_record(folder)
    path = folder / rng.choice(list(make.RECORD))
    dump, load = (yaml.safe_dump, yaml.safe_load) if path.suffix == ".yaml" else (json.dumps, json.loads)
    content = dump(mutate(make.RECORD[path.relative_to(folder).as_posix()], rng)).encode()
    path.write_bytes(flip(content, rng) if rng.random() < 0.2 else content)
    return path, _parses(lambda: load(path.read_bytes()))


def whole_record(folder: Path) -> None:
    """Write a run folder of which nothing is damaged."""
    for name, value in make.RECORD.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(value) if name == "config.yaml" else json.dumps(value))


PIPE = tiny_pipeline()
PIPE_OF_PARTS: Any = SimpleNamespace(transformer=flux2_transformer(), vae_scale_factor=8)
"""All of a pipeline of FLUX.2 that fitting looks at: its text encoder would take long to make."""


def read_adapter(path: Path) -> None:
    """Read an adapter and make what would be attached."""
    file = AdapterFile.read(path)
    fit(PIPE_OF_PARTS if "transformer" in file.configs else PIPE, file, path, "a")


def read_pairs(path: Path) -> None:
    """Read a listing and the first pair."""
    FolderPairs(read_listing(path.parent)).pair(0)


def read_captions(path: Path) -> None:
    """Read the captions of a folder, and what its pictures may be called."""
    options = FolderOptions(shuffle_tags=True, caption_prefix="a photo of")
    for picture in list_pictures(path.parent, options).pictures:
        for text in prompts_of(picture, "a dog", options).all:
            text.encode()  # as hashes and tokenizers do


def read_picture(path: Path) -> None:
    """Read a picture, and as a map of classes."""
    load_image(path)
    load_condition(path, is_map=True)


def read_record(path: Path) -> None:
    """Read a run folder, and say what a report says first."""
    run = read_run(path.parent.parent if path.parent.name == "samples" else path.parent)
    assert isinstance(f"{run.method_name} {run.trained} {run.settings()}", str)


READERS = {
    "adapter": Reader(changed_adapter, read_adapter, AdapterFileError),
    "config": Reader(
        changed_config,
        lambda path: parse_config(DreamBoothConfig, ["--config", str(path)]),
        SystemExit,
        names_file=False,  # a value out of range is known by its setting
    ),
    "listing": Reader(changed_listing, read_pairs, ValueError),
    "captions": Reader(changed_metadata, read_captions, ValueError),
    "picture": Reader(changed_picture, read_picture, UnreadableImageError),
    "record": Reader(changed_record, read_record, RunRecordError),
}


def fault(reader: Reader, path: Path) -> tuple[str | None, bool]:
    """What is wrong with how a file is read or refused, None if nothing, and whether it was read."""
    began = time.perf_counter()
    try:
        with _time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(path)
        wrong, was_read = None, True
    except reader.error as error:
        said, was_read = str(error), False
        wrong = None
        if len(said) > MESSAGE:
            wrong = f"an error of {len(said)} characters"
        elif reader.names_file and path.name not in said and str(path.parent) not in said:
            wrong = f"an error that does not name the file: {said[:300]}"
    except (Exception, TooSlow) as error:  # noqa: BLE001 all that is not documented
        wrong, was_read = "".join(traceback.format_exception_only(error)).strip()[:300], False
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        wrong += " in " + ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    if wrong is None and (seconds := time.perf_counter() - began) > SECONDS:
        wrong = f"{seconds:.1f} s"
    return wrong, was_read


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow(f"more than {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Tally:
    """What became of a reader's files."""

    files: int = 0
    parsed: int = 0
    read: int = 0
    slowest: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)


def fuzz(
    name: str, numbers: range, seed: int, folder: Path, keep: Path | None = None, until: float = float("inf")
) -> Tally:
    """Make and read the changed files of these numbers; stop at the time ``until``, of ``time.monotonic``."""
    reader, tally = READERS[name], Tally()
    for number in numbers:
        if time.monotonic() > until:
            break
        path, parses = reader.make(folder, random.Random(f"{seed} {name} {number}"))
        began = time.perf_counter()
        wrong, was_read = fault(reader, path)
        tally.slowest = max(tally.slowest, time.perf_counter() - began)
        tally.files += 1
        tally.parsed += parses
        tally.read += was_read
        if wrong is not None:
            tally.faults[wrong] += 1
            if keep is not None and tally.faults[wrong] == 1:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{name}-{number}{path.suffix}").write_bytes(path.read_bytes())
    return tally


def main() -> None:
    """The long mode.

    Raises:
        SystemExit: 1 if a file was neither read nor refused as documented.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--files", type=int, default=20_000, help="over all readers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, action="append", help="default: all")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-faults"), help="folder of what fails")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    chosen = given.reader or list(READERS)
    tallies, each = {name: Tally() for name in chosen}, -(-given.files // len(chosen))
    with tempfile.TemporaryDirectory() as scratch:
        for start in range(0, each, 200):
            for name in chosen:
                folder = Path(scratch, name)
                folder.mkdir(exist_ok=True)
                part = fuzz(name, range(start, min(start + 200, each)), given.seed, folder, given.keep)
                total = tallies[name]
                total.files, total.parsed, total.read = (
                    total.files + part.files, total.parsed + part.parsed, total.read + part.read,
                )  # fmt: skip
                total.slowest = max(total.slowest, part.slowest)
                total.faults += part.faults
            done = sum(tally.files for tally in tallies.values())
            failed = sum(tally.faults.total() for tally in tallies.values())
            print(f"{done} of {each * len(chosen)} files, {failed} faults", file=sys.stderr, flush=True)
    print(f"{'reader':10} {'files':>7} {'parsed':>8} {'read':>8} {'slowest':>9} {'faults':>7}")
    for name, tally in tallies.items():
        shares = f"{tally.parsed / tally.files:8.1%} {tally.read / tally.files:8.1%}"
        print(f"{name:10} {tally.files:7} {shares} {tally.slowest:7.2f} s {tally.faults.total():7}")
    print(f"largest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    faults = {f"{name}: {wrong}": n for name, tally in tallies.items() for wrong, n in tally.faults.items()}
    print("\n".join(f"{n} x {wrong}" for wrong, n in faults.items()))
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
