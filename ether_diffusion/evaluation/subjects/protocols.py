"""What a benchmark asks: which subjects, on which photos, with which prompts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ether_diffusion.config import suggestion
from ether_diffusion.files import atomic_path
from ether_diffusion.playground.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SUBJECTS,
    subject,
    true_pictures,
    write_subject,
)
from ether_diffusion.playground.world.captions import where_phrases, with_article
from ether_diffusion.reading import read_text, read_yaml

TRUTHS, ANSWERS = 8, 4
"""Drawings of what each prompt of the playground asks for: those that pictures are compared with, and others that stand
for a perfect answer."""
LIVE_CLASSES = ("cat", "dog")
"""Classes of the DreamBooth benchmark whose subjects are alive and get the other prompt list."""
UNRELATED = (
    "hot air balloons over a city",
    "a sailing boat off a rocky coast at sunset",
    "an astronaut reading a newspaper",
    "a red brick lighthouse in the fog",
    "a street market in the rain, oil painting",
    "a steam locomotive crossing a viaduct",
    "a portrait of an old fisherman",
    "a field of sunflowers under a stormy sky",
    "a chess board seen from above",
    "the interior of a modern library",
)
"""Prompts that no subject of the DreamBooth benchmark is of."""


@dataclass(frozen=True)
class Subject:
    """One subject of a benchmark.

    Attributes:
        name: unique, fit for a folder.
        class_word: what it is: "dog".
        references: folder with its photos.
        prompts: what to draw, with ``{token}`` where the rare word goes.
        unrelated: what has nothing to do with the subject, to see whether the finetuning changed it all the same.
        truths: for each prompt the true pictures that an answer is compared with; empty where nobody knows the truth.
        answers: for each prompt other true pictures, in the place of a perfect model's answers.
    """

    name: str
    class_word: str
    references: Path
    prompts: tuple[str, ...]
    unrelated: tuple[str, ...] = ()
    truths: tuple[tuple[Path, ...], ...] = ()
    answers: tuple[tuple[Path, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or {"/", "\\"} & set(self.name):
            raise ValueError(f"subject {self.name!r}: the name is to be a folder's")
        for prompt in self.prompts:
            try:
                prompt.format(token="")
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"subject {self.name}: {{token}} is all that braces may hold in a prompt, not {error}: {prompt}"
                ) from None
        if without := [prompt for prompt in self.prompts if "{token}" not in prompt]:
            raise ValueError(f"subject {self.name}: prompts without {{token}}: {'; '.join(without)}")
        if not self.prompts:
            raise ValueError(f"subject {self.name} has no prompts")

    @cached_property
    def fingerprint(self) -> str:
        """Stands for the names and contents of the references, so that a replaced photo is noticed."""
        return fingerprint(sorted(path for path in self.references.iterdir() if path.is_file()))

    @cached_property
    def truths_fingerprint(self) -> str | None:
        """The same of the truths; None without any."""
        return fingerprint([path for paths in self.truths for path in paths]) if self.truths else None


def fingerprint(paths: Sequence[Path]) -> str:
    """Stands for the names and contents of files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()[:12]


def load_protocol(name: str, data_dir: Path | None, work: Path, only: Sequence[str] = ()) -> list[Subject]:
    """The subjects of a protocol, in its order.

    Args:
        name: ``playground``; ``dreambooth``, whose 30 folders and ``prompts_and_classes.txt`` lie in ``data_dir``; or a
            YAML file: a list of ``{name, class, references, prompts}``, folders relative to the file; ``unrelated``
            prompts may be named, too.
        data_dir: where the photos of ``dreambooth`` are.
        work: folder that the playground's references are drawn into; truths go into the folder ``truths`` beside it.
        only: names of the subjects to take; all where it is empty.

    Raises:
        FileNotFoundError: photos, or the file, are not there.
        ValueError: a name in ``only`` is not one of the protocol's, or the protocol says something impossible.
    """
    if name == "playground":
        subjects = _playground(work, only)
    elif name == "dreambooth":
        if data_dir is None:
            raise ValueError("the protocol dreambooth needs data_dir: the folder with the 30 subjects' folders")
        subjects = _dreambooth(data_dir)
    else:
        subjects = _from_yaml(Path(name))
    _check_names(only, [each.name for each in subjects], name)
    return [each for each in subjects if not only or each.name in only]


def _check_names(wanted: Sequence[str], known: Sequence[str], protocol: str) -> None:
    for name in wanted:
        if name not in known:
            raise ValueError(f"protocol {protocol} has no subject {name!r}{suggestion(name, known)}")


def _playground(work: Path, only: Sequence[str]) -> list[Subject]:
    _check_names(only, SUBJECTS, "playground")
    found = []
    for name in only or SUBJECTS:
        individual = subject(name)
        kind, prompts = individual.class_word, individual.prompts
        if not (work / name).exists():
            write_subject(name, work / name)
        drawn = work.with_name("truths") / name
        if not drawn.exists():
            _draw_truths(name, drawn)
        paths = [
            tuple(drawn / f"{prompt:02d}-{index:02d}.png" for index in range(TRUTHS + ANSWERS))
            for prompt in range(len(prompts))
        ]
        found.append(
            Subject(
                name,
                kind,
                work / name,
                prompts,
                _other_things(kind),
                truths=tuple(each[:TRUTHS] for each in paths),
                answers=tuple(each[TRUTHS:] for each in paths),
            )
        )
    return found


def _draw_truths(name: str, folder: Path) -> None:
    """Draw what every prompt of a subject asks for, ``<prompt>-<index>.png``, as a whole or not at all."""
    individual = subject(name)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for prompt, request in enumerate(individual.requests):
            for index, picture in enumerate(true_pictures(individual, request, TRUTHS + ANSWERS)):
                picture.save(temporary / f"{prompt:02d}-{index:02d}.png")


def _other_things(kind: str) -> tuple[str, ...]:
    """A prompt for every other class of the playground, each in a colour and a place of its own."""
    colours, places = list(COLOURS), [where_phrases(background)[0] for background in BACKGROUNDS]
    return tuple(
        f"{with_article(f'{colours[number % len(colours)]} {other}')} {places[number % len(places)]}"
        for number, other in enumerate(KINDS)
        if other != kind
    )


def _dreambooth(data_dir: Path) -> list[Subject]:
    listing = data_dir / "prompts_and_classes.txt"
    if not listing.is_file():
        raise FileNotFoundError(f"{listing} is missing: it lists the classes and prompts of the DreamBooth benchmark")
    text = read_text(listing)
    rows = re.findall(r"^([\w-]+),([\w -]+)$", text.split("Prompts")[0], flags=re.MULTILINE)
    lists = [re.findall(r"'([^'\n]*\{0\}[^'\n]*)'", part) for part in text.split("prompt_list")[1:]]
    if len(lists) != 2 or len(rows) < 2:
        raise ValueError(f"{listing} is not the benchmark's: it should have a list of classes and two of prompts")
    found = []
    for name, kind in rows:
        if name == "subject_name":
            continue
        prompts = tuple(p.replace("{0}", "{token}").replace("{1}", kind) for p in lists[kind in LIVE_CLASSES])
        found.append(Subject(name, kind, _folder(data_dir / name), prompts, UNRELATED))
    return found


def _from_yaml(path: Path) -> list[Subject]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is no file; a protocol is playground, dreambooth or a YAML file of subjects")
    entries = read_yaml(path)
    keys, more = {"name", "class", "references", "prompts"}, {"unrelated"}
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and keys <= set(entry) <= keys | more for entry in entries
    ):
        raise ValueError(f"{path}: a list of subjects is expected, each with {', '.join(sorted(keys))}")
    for entry in entries:
        for key in ("prompts", "unrelated"):
            value = entry.get(key, [])
            if not isinstance(value, list) or not all(isinstance(prompt, str) for prompt in value):
                raise ValueError(f"{path}: {key} of {entry['name']} is to be a list of prompts, not {value!r}")
    names = [entry["name"] for entry in entries]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: several subjects are called {', '.join(sorted(twice))}")
    return [
        Subject(
            str(entry["name"]),
            str(entry["class"]),
            _folder(path.parent / entry["references"]),
            tuple(entry["prompts"]),
            tuple(entry.get("unrelated", ())),
        )
        for entry in entries
    ]


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path} with a subject's photos")
    return path
