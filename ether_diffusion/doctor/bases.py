"""Which of the recipes' bases are on this machine; nothing is asked of the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ether_diffusion.playground import GUIDANCE
from ether_diffusion.reading import DamagedFileError, read_json
from ether_diffusion.recipes import recipes, training_settings

WEIGHTS = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)\.(safetensors|bin)(?P<index>\.index\.json)?")
"""What recipes load: weights in one file, or the index of several; a variant's, such as fp16, have longer names."""


@dataclass(frozen=True)
class KnownBase:
    """A base that a recipe is for.

    Attributes:
        name: Hub id, or of an embedded one its name.
        recipes: that name it.
        state: ``embedded``, ``here``, ``incomplete`` or ``absent``.
        lacks: of an incomplete one what is not there.
    """

    name: str
    recipes: tuple[str, ...]
    state: str
    lacks: tuple[str, ...] = ()


def known_bases() -> list[KnownBase]:
    """The bases that recipes name, in the order of the recipes' names."""
    named: dict[tuple[str, str | None], list[str]] = {}
    for recipe, path in recipes().items():
        training = training_settings(path)
        if base := training.get("pretrained_model_name_or_path"):
            named.setdefault((str(base), training.get("revision")), []).append(recipe)
    return [KnownBase(base, tuple(by), *_state(base, revision)) for (base, revision), by in named.items()]


def _state(base: str, revision: str | None) -> tuple[str, tuple[str, ...]]:
    if base in GUIDANCE:
        return "embedded", ()
    try:
        folder = Path(snapshot_download(base, revision=revision, local_files_only=True))
        index = read_json(folder / "model_index.json", dict[str, object])
    except (LocalEntryNotFoundError, FileNotFoundError):  # one page of it may be here, but nothing to load
        return "absent", ()
    except DamagedFileError:
        return "incomplete", ("model_index.json",)
    lacks = tuple(part for part in _parts(index) if not _is_whole(folder / part))
    return ("incomplete", lacks) if lacks else ("here", ())


def _parts(index: Mapping[str, Any]) -> list[str]:
    """The parts of a pipeline that training needs."""
    from ether_diffusion.families.registry import unused_parts  # imports torch and diffusers

    unused = unused_parts(str(index.get("_class_name")))
    pairs = {key: value for key, value in index.items() if isinstance(value, list) and len(value) == 2}
    return [key for key, pair in pairs.items() if None not in pair and key not in unused]


def _is_whole(folder: Path) -> bool:
    """Whether the folder of a part is there, and has weights if it is a model: all of those that its index names."""
    if not folder.is_dir():
        return False
    if not (folder / "config.json").is_file():  # schedulers, tokenizers and processors have settings of other names
        return True
    files = {path.name for path in folder.iterdir() if path.is_file()}  # a link to a blob that is gone is no file
    found = [match for name in files if (match := WEIGHTS.fullmatch(name))]
    try:
        shards = [set(read_json(folder / each[0], _Index)["weight_map"].values()) for each in found if each["index"]]
    except DamagedFileError:
        return False
    return any(not each["index"] for each in found) or any(names and names <= files for names in shards)


class _Index(TypedDict):
    """What is read of the index of weights in several files: from each tensor to its file."""

    weight_map: dict[str, str]
