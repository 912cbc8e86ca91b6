"""The frozen base model that a run starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from ether_diffusion.config import suggestion
from ether_diffusion.families.parts import DENOISERS, left_out
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import FAMILIES, UnknownFamilyError, family_named, family_of
from ether_diffusion.pipelines.file import first_line, is_local_name
from ether_diffusion.pipelines.single_file import SingleFileError, is_single_file, load_single_file, read_header
from ether_diffusion.playground import NAME as PLAYGROUND
from ether_diffusion.playground import base_folder
from ether_diffusion.training.sections import BaseSection

logger = logging.getLogger(__name__)

LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
"""Whose classes a base may consist of, beside those of diffusers' own pipelines."""
CONFIG_ONLY = (
    "`hf download stabilityai/stable-diffusion-xl-base-1.0 --include '*.json' '*.txt' --local-dir sdxl-settings`"
)
"""A command that fetches a folder of settings."""
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class BaseModelError(RuntimeError):
    """The base model cannot be loaded, or is of a kind that cannot be trained."""


def load_base(base: BaseSection, mixed_precision: str) -> DiffusionPipeline:
    """Load the base as a pipeline, frozen; which family it is of its own ``model_index.json`` tells.

    Frozen parts are kept in the precision of the computation, the autoencoder and all that is trained in fp32.

    Raises:
        BaseModelError: nothing is found under that name, the Hub cannot be reached, or no family trains it.
    """
    name, source = _located(base), _source(base)
    file = base.pretrained_model_name_or_path if base.base_config is not None else None
    try:
        index, family = _index(name, base)
        dtypes: dict[str, torch.dtype] = {"default": DTYPES[mixed_precision], "vae": torch.float32}
        if base.entry.saved_as == "pipeline":
            dtypes[family.DENOISER] = torch.float32
            if base.train_text_encoder:
                dtypes |= dict.fromkeys(family.TEXT_ENCODERS, torch.float32)
        if file is not None:
            pipe = load_single_file(file, name, dtypes)
        else:
            without = left_out(index, family.UNUSED)
            pipe = DiffusionPipeline.from_pretrained(name, dtype=dtypes, variant=base.variant, **source, **without)
    except SingleFileError as error:
        raise BaseModelError(str(error)) from error
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ValueError) as error:
        if isinstance(error, ValueError) and Path(name).is_dir() and not _variants(Path(name)):
            raise BaseModelError(f"the base model {name} cannot be loaded: {first_line(error)}") from error
        raise BaseModelError(_not_found(name, error)) from error
    if why := family_of(pipe).misfit():
        raise BaseModelError(f"the base model {name} cannot be trained here: {why}")
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    return pipe


def describe_base(base: BaseSection, mixed_precision: str) -> Family:
    """The base's family around its modules on the meta device, from their settings alone: no weight is read.

    Raises:
        BaseModelError: nothing is found under that name, or no family trains it.
    """
    name, source = _located(base), _source(base)
    try:
        index, family = _index(name, base)
        without = left_out(index, family.UNUSED)
        modules = {
            part: _described(name, part, *entry, **source)
            for part, entry in _parts(index).items()
            if part not in without
        }
        found = {part: module for part, module in modules.items() if module is not None}
        pipe = DiffusionPipeline.from_pretrained(name, **source, **without, **found)
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ValueError) as error:
        raise BaseModelError(_not_found(name, error)) from error
    described = family_of(pipe)
    if why := described.misfit():
        raise BaseModelError(f"the base model {name} cannot be trained here: {why}")
    nn.Module.to(described.denoiser, DTYPES[mixed_precision])
    return described


def _located(base: BaseSection) -> str:
    """The folder or Hub id that has a base's settings, which for a single file is another one.

    Raises:
        BaseModelError: it is a file without such a folder, or a folder that does not exist.
    """
    name = base_folder(base.pretrained_model_name_or_path)
    if is_single_file(name):
        return _described_by(Path(name), base)
    if base.base_config is not None:
        raise BaseModelError(f"base_config is for a base in a single file, and {name} is none: leave it out")
    if not Path(name).is_dir() and is_local_name(name):
        raise BaseModelError(f"there is no folder {name} with a base model: check the path")
    return name


def _described_by(file: Path, base: BaseSection) -> str:
    """The folder with the settings of a base in a single file.

    Raises:
        BaseModelError: none is named, or it is none; the file is not there or of another kind; or a setting is for
            folders and the Hub.
    """
    try:
        read_header(file)
    except (FileNotFoundError, SingleFileError) as error:
        raise BaseModelError(str(error)) from None
    if base.revision or base.variant:
        raise BaseModelError(f"revision and variant are for folders and the Hub, and {file} is a file: leave them out")
    if base.base_config is None:
        raise BaseModelError(
            f"{file} is a single file, which has no settings: add --base_config FOLDER, a diffusers folder of the same "
            f"architecture; for Stable Diffusion XL, {CONFIG_ONLY} gives one without weights"
        )
    folder = base_folder(base.base_config)
    if not (Path(folder) / "model_index.json").is_file():
        raise BaseModelError(f"base_config {folder} is no diffusers folder here: it has no model_index.json")
    return folder


def _source(base: BaseSection) -> dict[str, str]:
    return {"revision": base.revision} if base.revision else {}


def _index(name: str, base: BaseSection) -> tuple[dict[str, Any], type[Family]]:
    """The base's ``model_index.json``, and its family.

    Raises:
        BaseModelError: no family trains it, or a setting is another family's.
    """
    index: dict[str, Any] = DiffusionPipeline.load_config(name, **_source(base))
    family = _family(name, str(index.get("_class_name")))
    _check_chosen(family, base.chosen)
    for part, (library, kind) in _parts(index).items():
        if not (library in (None, *LIBRARIES) or hasattr(diffusers.pipelines, str(library))):
            raise BaseModelError(
                f"the base model {name} cannot be trained here: its {part} is {kind} of the package {library}, which "
                f"would be imported and run; parts may be of {' and '.join(LIBRARIES)}"
            )
    return index, family


def _parts(index: Mapping[str, Any]) -> dict[str, Sequence[str | None]]:
    """The parts of an index, each with its library and class; what else is a list there is a setting."""
    pairs = {key: value for key, value in index.items() if isinstance(value, list | tuple) and len(value) == 2}
    return {key: pair for key, pair in pairs.items() if all(isinstance(each, str | None) for each in pair)}


def _described(name: str, part: str, library: str | None, kind: str | None, **source: str) -> nn.Module | None:
    """A module of a base with the sizes that its settings say, on the meta device; None where the part is no module."""
    found: Any = getattr(LIBRARIES.get(str(library)), str(kind), None)
    if nn.Module not in getattr(found, "__mro__", ()):
        return None
    with torch.device("meta"):
        if library == "diffusers":
            module: nn.Module = found.from_config(found.load_config(name, subfolder=part, **source))
        else:
            module = found(transformers.AutoConfig.from_pretrained(name, subfolder=part, **source))
    return module


def _family(name: str, pipeline: str) -> type[Family]:
    """The family that trains pipelines of that class.

    Raises:
        BaseModelError: none does.
    """
    try:
        return family_named(pipeline)
    except UnknownFamilyError as error:
        raise BaseModelError(f"the base model {name} cannot be trained here: {error}") from None


def _check_chosen(family: type[Family], chosen: frozenset[str]) -> None:
    """Refuse settings of other families.

    Raises:
        BaseModelError: one was chosen.
    """
    for setting in sorted(chosen - family.OPTIONS):
        able = [each.TITLE for each in FAMILIES.values() if setting in each.OPTIONS]
        raise BaseModelError(f"{setting} is no setting for {family.TITLE}: leave it out; {', '.join(able)} have it")


def _not_found(name: str, error: Exception) -> str:
    if Path(name).is_dir():
        if variants := _variants(Path(name)):
            return f"{name} has its weights as {', '.join(variants)} only: add --variant {variants[0]}"
        return f"{name} is no diffusers folder: {first_line(error)}"
    near = "" if "/" in name else suggestion(name, [PLAYGROUND])
    return (
        f"there is no folder {name}{near}{';' if near else ','} and as a Hub id it could not be fetched: "
        f"{first_line(error)} "
        "(check the name, the connection and HF_HUB_OFFLINE, and log in for gated models)"
    )


def _variants(folder: Path) -> list[str]:
    """The variants that a diffusers folder has its denoiser's weights in, as fp16; none where it has plain ones."""
    files = [path for name in DENOISERS for path in folder.glob(f"{name}/diffusion_pytorch_model*.safetensors*")]
    names = [path.name.split(".") for path in files]
    if any(parts[1].startswith("safetensors") for parts in names):
        return []
    return sorted({parts[1].split("-")[0] for parts in names})
