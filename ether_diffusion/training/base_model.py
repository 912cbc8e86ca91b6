"""The frozen base model that a run starts from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from ether_diffusion.config import suggestion
from ether_diffusion.pipelines.file import first_line, is_local_name
from ether_diffusion.playground import NAME as PLAYGROUND
from ether_diffusion.playground import base_folder
from ether_diffusion.training.sections import BaseSection

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

KINDS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Pipelines of diffusers that can be trained; of these only the one that is needed is imported."""

PREDICTIONS = ("epsilon", "v_prediction")
"""What a base may predict."""

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


class BaseModelError(RuntimeError):
    """The base model cannot be loaded, or is of a kind that cannot be trained."""


def load_base(base: BaseSection, mixed_precision: str) -> DiffusionPipeline:
    """Load the base as a pipeline, frozen; whether it is SD or SDXL its own ``model_index.json`` tells.

    Frozen parts are kept in the precision of the computation, the autoencoder and all that is trained in fp32.

    Raises:
        BaseModelError: nothing is found under that name, the Hub cannot be reached, or it is no Stable Diffusion.
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
        _check_kind(name, str(index.get("_class_name")))
        dtypes: dict[str, torch.dtype] = {"default": DTYPES[mixed_precision], "vae": torch.float32}
        if base.entry.saved_as == "pipeline":
            dtypes["unet"] = torch.float32
            if base.train_text_encoder:
                dtypes |= {"text_encoder": torch.float32, "text_encoder_2": torch.float32}
        pipe = DiffusionPipeline.from_pretrained(name, dtype=dtypes, variant=base.variant, **source, **_without(index))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ValueError) as error:
        if isinstance(error, ValueError) and Path(name).is_dir() and not _variants(Path(name)):
            raise BaseModelError(f"the base model {name} cannot be loaded: {first_line(error)}") from error
        raise BaseModelError(_not_found(name, error)) from error
    _check_objective(name, pipe)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    return pipe


def _check_objective(name: str, pipe: DiffusionPipeline) -> None:
    """Refuse bases that the losses of these programs would train for something else than what they were trained for.

    Raises:
        BaseModelError: its noise is not that of a DDPM, or its latents have statistics that nothing here applies.
    """
    scheduler, vae = pipe.scheduler.config, pipe.vae.config
    kind, predicted = type(pipe.scheduler).__name__, scheduler.get("prediction_type", "epsilon")
    other = "EDM" in kind or "FlowMatch" in kind or "sigma_data" in scheduler or scheduler.get("use_flow_sigmas")
    other = other or scheduler.get("timestep_type") == "continuous"
    if other or "beta_start" not in scheduler:
        why = f"its scheduler is {kind}, whose noise is not that of a DDPM"
    elif predicted not in PREDICTIONS:
        why = f"it predicts {predicted}"
    elif vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        why = "its latents are shifted and scaled by latents_mean and latents_std of its autoencoder"
    elif vae.get("shift_factor"):
        why = f"its latents are shifted by shift_factor={vae['shift_factor']} of its autoencoder"
    else:
        return
    raise BaseModelError(
        f"the base model {name} cannot be trained here: {why}; these programs train bases with DDPM noise that predict "
        f"{' or '.join(PREDICTIONS)}"
    )


def _without(index: dict[str, Any]) -> dict[str, Any]:
    """Leave out what training does not need: the safety checker and image encoders."""
    absent: dict[str, Any] = {name: None for name in UNUSED if name in index}
    return {**absent, "requires_safety_checker": False} if "safety_checker" in absent else absent


def _check_kind(name: str, class_name: str) -> None:
    if class_name not in KINDS:
        raise BaseModelError(f"the base model {name} is a {class_name}; this program trains {' or '.join(KINDS)}")


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
    """The variants that a diffusers folder has its UNet's weights in, such as fp16; none where it has plain ones."""
    names = [path.name for path in folder.glob("unet/diffusion_pytorch_model*.safetensors")]
    if "diffusion_pytorch_model.safetensors" in names:
        return []
    return sorted({parts[1] for name in names if len(parts := name.split(".")) == 3})
