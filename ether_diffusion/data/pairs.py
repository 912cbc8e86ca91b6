"""Where pairs of a picture and its condition come from: a folder, a dataset of the Hub, or an endless generator.

A folder is read in one of two layouts: the image folder of 🤗 Datasets, with a ``metadata.jsonl`` of lines
``{"file_name": "images/1.png", "conditioning_image": "maps/1.png", "text": "a dog"}`` or a ``metadata.csv`` of such
columns, or that of ControlNet's tutorial, a ``prompt.json`` of lines ``{"source": "source/1.png", "target":
"target/1.png", "prompt": "a dog"}``, where the source is the condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps

from ether_diffusion.control.conditions import load_condition, map_picture
from ether_diffusion.data.metadata import SHOWN_PROBLEMS, captions_of, check_inside, read_rows
from ether_diffusion.images import (
    DECODING_ERRORS,
    UnreadableImageError,
    check_folder,
    check_picture,
    list_images,
    load_captions,
    load_image,
    prepare_decoder,
)
from ether_diffusion.reading import check_regular

LAYOUTS = ("metadata.jsonl", "prompt.json", "metadata.csv")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a dataset, and keys of ``metadata.jsonl`` beside ``file_name``."""

    image: str = "image"
    condition: str = "conditioning_image"
    caption: str = "text"


@dataclass(frozen=True)
class Pair:
    """A picture, what controls it, and what it is called.

    Attributes:
        image: RGB.
        condition: RGB, of the same size; None where it is made from the picture.
        prompt: the caption, the first where it has several.
        captions: all of them, where it has several.
        name: of its file, for messages.
    """

    image: Image.Image
    condition: Image.Image | None
    prompt: str
    captions: tuple[str, ...] = ()
    name: str = "a picture"


class PairSource(Protocol):
    """Pairs by number."""

    endless: bool
    """Whether any number has a pair of its own."""

    def __len__(self) -> int:
        """How many there are; of an endless source 0."""

    def pair(self, index: int) -> Pair:
        """The pair of that number, decoded.

        Raises:
            UnreadableImageError: a file is broken; the message names it.
        """

    def captions(self) -> Iterable[str]:
        """All captions, without decoding a picture; none of an endless source.

        Raises:
            ValueError: a caption is none.
        """


@dataclass(frozen=True)
class PairFiles:
    """One line of a folder's listing.

    Attributes:
        image: the picture.
        condition: its condition, None where the listing has none.
        captions: of the picture, one or several.
        name: of the picture in the listing, which other files refer to.
    """

    image: Path
    condition: Path | None
    captions: tuple[str, ...]
    name: str

    @property
    def prompt(self) -> str:
        """The caption, the first where there are several."""
        return self.captions[0]


class FolderPairs:
    """The pairs of a folder; that all files are there, are pictures and have the same sizes is checked at once.

    Args:
        files: of :func:`read_listing`.
        maps: whether the conditions are semantic maps: grey ones hold class ids and are coloured.

    Raises:
        ValueError: a file is missing or no picture, or the sizes differ; the message lists the first of them.
    """

    endless = False

    def __init__(self, files: list[PairFiles], maps: bool = False) -> None:
        self.files, self.maps = files, maps
        problems = [problem for entry in files for problem in _problems(entry)]
        if problems:
            shown = "\n".join(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS])
            rest = f"\n  … and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
            raise ValueError(f"{len(problems)} problems with the training pairs:\n{shown}{rest}")

    def __len__(self) -> int:
        return len(self.files)

    def pair(self, index: int) -> Pair:
        """The pair of that number, decoded.

        Raises:
            UnreadableImageError: a file is broken; the message names it.
        """
        entry = self.files[index]
        condition = None if entry.condition is None else load_condition(entry.condition, self.maps)
        return Pair(load_image(entry.image), condition, entry.prompt, entry.captions, str(entry.image))

    def captions(self) -> Iterable[str]:
        """Those of the listing."""
        return [caption for entry in self.files for caption in entry.captions]


class DatasetPairs:
    """The pairs of a dataset of the Hub, or of any folder that 🤗 Datasets reads.

    Args:
        name: its id, or a folder.
        columns: where picture, condition and caption are; a missing condition column means that there are none.
        split: which part.
        condition: whether there is a column of conditions.
        maps: whether the conditions are semantic maps: grey ones hold class ids and are coloured.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: the dataset cannot be loaded, or has no such columns.
    """

    endless = False

    def __init__(
        self, name: str, columns: Columns, split: str = "train", condition: bool = True, maps: bool = False
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"dataset_name needs datasets ({error}): pip install 'ether-diffusion[hub]'") from error
        try:
            self.rows: Any = datasets.load_dataset(name, split=split)
        except Exception as error:  # datasets raises whatever its readers raise
            raise ValueError(f"the dataset {name} cannot be loaded: {str(error).splitlines()[0]}") from error
        wanted = (columns.image, columns.caption, *([columns.condition] if condition else []))
        if missing := [column for column in wanted if column not in self.rows.column_names]:
            raise ValueError(
                f"the dataset {name} has no column {missing[0]!r} but {', '.join(self.rows.column_names)}: name yours "
                "with --image_column, --conditioning_image_column and --caption_column"
            )
        for column in wanted[::2]:
            if not isinstance(self.rows.features[column], datasets.Image):
                raise ValueError(f"the column {column!r} of {name} holds no pictures but {self.rows.features[column]}")
        self.name, self.columns, self.condition, self.maps = name, columns, condition, maps

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, index: int) -> Pair:
        """The pair of that number, decoded.

        Raises:
            UnreadableImageError: a picture is broken.
            ValueError: the sizes differ.
        """
        try:
            row = self.rows[index]
            for column in (self.columns.image, *([self.columns.condition] if self.condition else [])):
                check_picture(row[column])
            image = ImageOps.exif_transpose(row[self.columns.image]).convert("RGB")
            condition = None
            if self.condition:
                turned = ImageOps.exif_transpose(row[self.columns.condition])
                condition = map_picture(turned) if self.maps else turned.convert("RGB")
        except DECODING_ERRORS as error:
            raise UnreadableImageError(f"row {index} of {self.name} cannot be decoded ({error})") from error
        if condition is not None and condition.size != image.size:
            raise ValueError(f"row {index} of {self.name}: {_sizes(image, condition)}")
        captions = self._captions_of(index, row[self.columns.caption])
        return Pair(image, condition, captions[0], captions, f"row {index} of {self.name}")

    def captions(self) -> Iterable[str]:
        """Those of the column; an empty dataset has none.

        Raises:
            ValueError: a row has no caption.
        """
        column = self.rows.select_columns([self.columns.caption])
        return [
            text for index, row in enumerate(column) for text in self._captions_of(index, row[self.columns.caption])
        ]

    def _captions_of(self, index: int, value: Any) -> tuple[str, ...]:
        try:
            return captions_of(value)
        except TypeError as error:
            raise ValueError(f"row {index} of {self.name}: {error}") from error


class EndlessPairs:
    """Pairs that are made when they are asked for.

    Args:
        make: the pair of a number, always the same.
    """

    endless = True

    def __init__(self, make: Callable[[int], Pair]) -> None:
        self.pair = make

    def __len__(self) -> int:
        return 0

    def captions(self) -> Iterable[str]:
        """None that could be counted."""
        return ()


def read_listing(
    folder: str | Path,
    columns: Columns = Columns(),
    captions: bool = True,
    allow_outside_paths: bool = False,
) -> list[PairFiles]:
    """The lines of a folder's ``metadata.jsonl``, ``prompt.json`` or ``metadata.csv``; no file is opened yet.

    Without ``captions`` a line may lack its caption, which is then empty. A caption may be a list of several.

    Args:
        folder: holds the listing.
        columns: its keys.
        captions: whether every line must have a caption.
        allow_outside_paths: whether it may name files outside of the folder, by absolute paths or ``..``.

    Raises:
        FileNotFoundError: there is no such folder, or no listing in it.
        ValueError: a line is not what it should be, names a file outside of the folder, or there are none.
        NotARegularFileError: the listing is a pipe or a device.
    """
    folder = check_folder(folder)
    found = [folder / name for name in LAYOUTS if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds neither metadata.jsonl nor prompt.json nor metadata.csv, which say what belongs to what; "
            'lines of the first look like {"file_name": "images/1.png", "conditioning_image": "maps/1.png", "text": '
            '"a dog"}'
        )
    listing, image, condition, caption = found[0], "file_name", columns.condition, columns.caption
    if listing.name == "prompt.json":
        image, condition, caption = "target", "source", "prompt"
    entries = []
    expected = f'{{"{image}": …, "{condition}": …, "{caption}": …}}'
    for line in read_rows(listing, expected):
        row = line.values
        try:
            if caption == "text" and "text" not in row:
                row["text"] = row["prompt"]
            if not captions:
                row = {caption: "", **row}
            entry = PairFiles(
                folder / row[image],
                folder / row[condition] if row.get(condition) else None,
                captions_of(row[caption]),
                str(row[image]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{line.where}: {expected} is expected, not {line.text[:80]}") from error
        if not allow_outside_paths:
            for path in (row[image], row.get(condition)):
                check_inside(path, line.where)
        entries.append(entry)
    if not entries:
        raise ValueError(f"{listing} is empty: it should have a line for each picture")
    return entries


def plain_listing(folder: str | Path) -> list[PairFiles]:
    """The pictures of a folder without a listing, for conditions that are made from them; ``.txt`` files are captions.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no readable picture.
    """
    return [PairFiles(path, None, load_captions(path) or ("",), path.name) for path in list_images(folder)]


def _problems(entry: PairFiles) -> list[str]:
    """What is wrong with the files of a pair, by their headers alone."""
    sizes, problems = [], []
    for path in filter(None, (entry.image, entry.condition)):
        try:
            check_regular(path)
            prepare_decoder(path)
            with Image.open(path) as image:
                check_picture(image)
                exif = image.getexif() if "exif" in image.info else {}  # without, a PNG would be read to its end
                turned = exif.get(0x0112, 1) in (5, 6, 7, 8)  # orientations whose sides are exchanged
                sizes.append(image.size[::-1] if turned else image.size)
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except DECODING_ERRORS as error:
            problems.append(f"{str(path)[:300]} is no readable picture ({str(error)[:300]})")
    if len(set(sizes)) > 1:
        problems.append(f"{entry.image} has {_by(sizes[0])} pixels, its condition {entry.condition} {_by(sizes[1])}")
    return problems


def _sizes(image: Image.Image, condition: Image.Image) -> str:
    return f"the picture has {_by(image.size)} pixels, its condition {_by(condition.size)}"


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
