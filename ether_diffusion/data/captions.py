"""What the pictures of a folder are called: their own captions, a prefix, and tags in several orders.

Text encoders leave the device once all prompts are encoded. So the prompts of a run are a finite set that is known at
its start: of a shuffled caption a few orders are drawn once, and each sample takes one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TypeVar

import torch

from ether_diffusion.data.metadata import Metadata, read_metadata
from ether_diffusion.data.options import DEFAULTS, FolderOptions
from ether_diffusion.data.randomness import generator
from ether_diffusion.images import check_folder, load_captions, sort_files

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """A picture of a folder.

    Args:
        path: of the file.
        name: its path in the folder.
        captions: its own; none where it is called as its folder is.
    """

    path: Path
    name: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class PictureFolder:
    """What a folder holds.

    Args:
        pictures: sorted by name.
        listing: the file with their captions, if there is one.
        skipped: files that are no picture.
    """

    pictures: list[Picture]
    listing: Path | None
    skipped: list[Path]


@dataclass(frozen=True)
class Prompts:
    """What one picture may be called.

    Args:
        captions: of each caption the texts that it may be given as: its orders of tags.
    """

    captions: tuple[tuple[str, ...], ...]

    @property
    def first(self) -> str:
        """The first text of the first caption."""
        return self.captions[0][0]

    @property
    def all(self) -> list[str]:
        """Every text."""
        return [text for texts in self.captions for text in texts]

    def draw(self, random: torch.Generator) -> str:
        """One caption, each as likely, in one of its orders; nothing is drawn where there is no choice."""
        texts = _choice(self.captions, random)
        return _choice(texts, random)


def list_pictures(folder: str | Path, options: FolderOptions = DEFAULTS) -> PictureFolder:
    """The readable pictures of a folder with their captions, from the metadata or from the texts beside them.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
        ValueError: it has no readable picture, the metadata are not what they should be, or a picture has captions in
            the metadata and beside it that differ.
        MissingDecoderError: a picture needs an optional package.
    """
    folder = check_folder(folder)
    metadata = read_metadata(folder, options.caption_column)
    if metadata is None:
        paths, skipped = sort_files(folder, options.nested_folders)
    else:
        named = [folder / name for name in metadata.captions]
        paths, skipped = sort_files(folder, options.nested_folders, named, without=metadata.path)
    pictures = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        pictures.append(Picture(path, name, _captions(path, name, metadata)))
    return PictureFolder(pictures, None if metadata is None else metadata.path, skipped)


def prompts_of(picture: Picture, prompt: str, options: FolderOptions = DEFAULTS) -> Prompts:
    """What a picture may be called; ``prompt`` where it has no captions."""
    if not picture.captions:
        return Prompts(((prompt,),))
    prefix = f"{options.caption_prefix} " if options.caption_prefix else ""
    return Prompts(tuple(tuple(prefix + text for text in _texts(each, options)) for each in picture.captions))


def tag_orders(caption: str, keep: int, number: int, seed: int) -> list[str]:
    """At most ``number`` orders of the tags of a caption, of which the first ``keep`` stay where they are.

    All orders, if there are no more; otherwise ``number`` draws, of which equal ones count once. A caption without two
    tags to exchange is returned as it is.
    """
    tags = [tag for each in caption.split(",") if (tag := each.strip())]
    kept, loose = tags[:keep], tags[keep:]
    if len(set(loose)) < 2:
        return [caption]
    orders: Iterable[Iterable[str]]
    if len(loose) <= number and math.factorial(len(loose)) <= number:
        orders = permutations(loose)
    else:
        random = generator(seed, "tag orders", caption)
        orders = ([loose[i] for i in torch.randperm(len(loose), generator=random).tolist()] for _ in range(number))
    return list(dict.fromkeys(", ".join([*kept, *order]) for order in orders))


def _texts(caption: str, options: FolderOptions) -> list[str]:
    if not options.shuffle_tags:
        return [caption]
    return tag_orders(caption, options.keep_tags, options.tag_orders, options.seed)


def _captions(path: Path, name: str, metadata: Metadata | None) -> tuple[str, ...]:
    """The captions of a picture, whichever of metadata and text has them."""
    beside = load_captions(path)
    listed = metadata.captions.get(name, ()) if metadata else ()
    if metadata and beside and listed and beside != listed:
        raise ValueError(f"{path} has a caption in {metadata.where[name]} and another in a text beside it: keep one")
    return listed or beside


def _choice(items: tuple[T, ...], random: torch.Generator) -> T:
    return items[int(torch.randint(len(items), (), generator=random))] if len(items) > 1 else items[0]
