"""The frozen base model that a run starts from."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from ether_diffusion.config import suggestion
from ether_diffusion.families.parts import DENOISERS, parts_without
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import FAMILIES, UnknownFamilyError, family_named, family_of
from ether_diffusion.pipelines.file import first_line, is_local_name
from ether_diffusion.playground import NAME as PLAYGROUND
from ether_diffusion.playground import base_folder
from ether_diffusion.training.sections import BaseSection

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class BaseModelError(RuntimeError):
    """The base model cannot be loaded, or is of a kind that cannot be trained."""


def load_base(base: BaseSection, mixed_precision: str) -> DiffusionPipeline:
    """Load the base as a pipeline, frozen; which family it is of its own ``model_index.json`` tells.

    Frozen parts are kept in the precision of the computation, the autoencoder and all that is trained in fp32.

    Raises:
        BaseModelError: nothing is found under that name, the Hub cannot be reached, or no family trains it.
    """
    name = base_folder(base.pretrained_model_name_or_path)
    if Path(name).is_file():
        raise BaseModelError(
            f"{name} is a file, and the base is a diffusers folder or a Hub id; a checkpoint in a single file becomes "
            f'a folder with StableDiffusionPipeline.from_single_file("{name}").save_pretrained("base")'
        )
    if not Path(name).is_dir() and is_local_name(name):
        raise BaseModelError(f"there is no folder {name} with a base model: check the path")
    source = {"revision": base.revision} if base.revision else {}
    try:
        index = DiffusionPipeline.load_config(name, **source)
        family = _family(name, str(index.get("_class_name")))
        _check_chosen(family, base.chosen)
        dtypes: dict[str, torch.dtype] = {"default": DTYPES[mixed_precision], "vae": torch.float32}
        if base.entry.saved_as == "pipeline":
            dtypes[family.DENOISER] = torch.float32
            if base.train_text_encoder:
                dtypes |= dict.fromkeys(family.TEXT_ENCODERS, torch.float32)
        without = _without(index, family)
        pipe = DiffusionPipeline.from_pretrained(name, dtype=dtypes, variant=base.variant, **source, **without)
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
    """The base's family around its parts on the meta device, from their settings alone: no weight is read.

    Raises:
        BaseModelError: nothing is found under that name, or no family trains it.
    """
    name = base_folder(base.pretrained_model_name_or_path)
    source = {"revision": base.revision} if base.revision else {}
    try:
        index = DiffusionPipeline.load_config(name, **source)
        family = _family(name, str(index.get("_class_name")))
        _check_chosen(family, base.chosen)
        without = {*family.UNUSED, *parts_without(index)}
        parts: dict[str, Any] = dict.fromkeys(family.TEXT_ENCODERS)
        for part in (family.DENOISER, "vae", *family.TEXT_ENCODERS):
            if part in index and part not in without:
                parts[part] = _described(name, part, *index[part], **source)
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ValueError) as error:
        raise BaseModelError(_not_found(name, error)) from error
    nn.Module.to(parts[family.DENOISER], DTYPES[mixed_precision])
    return family(cast(DiffusionPipeline, SimpleNamespace(config=index, **parts)))


def _described(name: str, part: str, library: str, kind: str, **source: str) -> nn.Module:
    """A part of a base with the sizes that its settings say, on the meta device."""
    package = importlib.import_module(library)
    found: Any = getattr(package, kind)
    with torch.device("meta"):
        if library == "transformers":
            settings = package.AutoConfig.from_pretrained(name, subfolder=part, **source)
            module: nn.Module = found(settings)
        else:
            module = found.from_config(found.load_config(name, subfolder=part, **source))
    return module


def _without(index: dict[str, Any], family: type[Family]) -> dict[str, Any]:
    """Leave out what training does not need, the safety checker and image encoders, and what is not there."""
    absent: dict[str, Any] = {name: None for name in family.UNUSED if name in index} | parts_without(index)
    return {**absent, "requires_safety_checker": False} if "safety_checker" in absent else absent


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
