"""The adapters of a file for a pipeline: everything is checked before anything is attached."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.adapter import Adapter, check_blocks
from ether_diffusion.core.state import StateMismatchError, state_problems
from ether_diffusion.core.targets import Target, find_targets, find_targets_of_0_1
from ether_diffusion.families.parts import denoiser_name, denoiser_of
from ether_diffusion.families.registry import control_place
from ether_diffusion.pipelines.control_hook import first_width
from ether_diffusion.pipelines.file import AdapterFile, AdapterFileError
from ether_diffusion.pipelines.fingerprint import base_hash
from ether_diffusion.pipelines.new_tokens import token_misfits
from ether_diffusion.pipelines.schema import CONTROL, vector_shapes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 8
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
"""By the width of the prompts that the UNet's cross attention takes."""


class Fitted(NamedTuple):
    """An adapter with a file's vectors, and the projections that it is for."""

    adapter: Adapter
    targets: list[Target]


def fit(pipe: DiffusionPipeline, file: AdapterFile, source: str | Path, name: str) -> dict[str, Fitted]:
    """The file's adapters, not attached yet, by component of the pipeline.

    Raises:
        AdapterFileError: with all that keeps the file from fitting the pipeline.
    """
    fitted: dict[str, Fitted] = {}
    problems: list[str] = []
    for component in file.configs:
        try:
            fitted[component] = _fit_component(getattr(pipe, component, None), component, file, name)
        except StateMismatchError as error:
            problems += [problem.replace(": ", f": {component}.", 1) for problem in error.problems]
        except ValueError as error:
            problems.append(f"  {error}")
    problems += _control_misfits(pipe, file)
    if file.embeds is not None:
        problems += [f"  {problem}" for problem in token_misfits(pipe, file.embeds.token, file.embeds.rows)]
    if problems and (other := other_architecture(pipe, file)):
        problems = [f"  {other}"]
    if problems:
        shown = "\n".join(problems[:SHOWN_PROBLEMS])
        rest = f"\n  … and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        made_for = f" (it was trained on {file.base_model})" if file.base_model else ""
        raise AdapterFileError(f"{source} does not fit this {type(pipe).__name__}{made_for}:\n{shown}{rest}")
    return fitted


def other_architecture(pipe: DiffusionPipeline, file: AdapterFile) -> str | None:
    """Say in one line that the file is for another family of models, where the width of its prompts shows it."""
    made_for = {
        math.prod(vectors.shape[:2])
        for key, vectors in file.states.get("unet", {}).items()
        if key.endswith((".attn2.to_k.u", ".attn2.to_v.u", ".attn2.to_k.blocks", ".attn2.to_v.blocks"))
    }
    denoiser = getattr(pipe, denoiser_name(pipe) or "", None)
    present = getattr(getattr(denoiser, "config", None), "cross_attention_dim", None)
    if len(made_for) != 1 or not isinstance(present, int) or present in made_for:
        return None
    return f"made for {_family(*made_for)}, this is {_family(present)}: load it into a pipeline of its own base"


def _family(prompt_width: int) -> str:
    """What a UNet is called whose cross attention takes prompts of that width."""
    name = FAMILIES.get(prompt_width)
    return f"{name} (prompts of width {prompt_width})" if name else f"a UNet with prompts of width {prompt_width}"


def warn_if_other_base(pipe: DiffusionPipeline, file: AdapterFile, source: str | Path) -> None:
    """Log a warning for every component that the file was trained on another base of."""
    for component, trained_on in (file.base_hash or {}).items():
        present = base_hash(getattr(pipe, component))
        if present is not None and present != trained_on:
            logger.warning(
                "%s was trained on another base: its %s is %s (hash %s), this pipeline's is %s (hash %s); "
                "the result will differ from what was trained",
                source,
                component,
                file.base_model or "unknown",
                trained_on,
                pipe.config.get("_name_or_path") or "unknown",
                present,
            )


def _fit_component(module: nn.Module | None, component: str, file: AdapterFile, name: str) -> Fitted:
    if module is None:
        raise ValueError(f"the pipeline has no {component}, which the file has vectors for")
    config, state = file.configs[component], file.states[component]
    try:
        targets = _nearest_targets(module, config, state)
        check_blocks(targets, config)
    except ValueError as error:
        raise ValueError(f"{component}: {error}") from None
    expected = _vectors(config, targets)
    if problems := state_problems(state, expected):  # before vectors of these shapes are made
        raise StateMismatchError(name, problems)
    adapter = Adapter(config, targets, name)
    adapter.load_state_dict(state)
    return Fitted(adapter.requires_grad_(False), targets)


def _nearest_targets(module: nn.Module, config: EtherConfig, state: Mapping[str, Tensor]) -> list[Target]:
    """What the file's preset means: what version 0.1 found or what is found today, by the file's keys.

    Where neither fits, the one that fewer keys speak against: so a key that is missing is named as missing.
    """
    old = find_targets_of_0_1(module, config.targets)
    if old and _vectors(config, old).keys() == state.keys():
        return old
    today = find_targets(module, config.targets)
    meanings = [today, old] if old else [today]
    return min(meanings, key=lambda targets: len(_vectors(config, targets).keys() ^ state.keys()))


def _vectors(config: EtherConfig, targets: list[Target]) -> dict[str, Tensor]:
    """The state of an adapter of these targets, on the meta device."""
    return {
        f"{target.path}.{vector}": torch.empty(shape, device="meta")
        for target in targets
        for vector, shape in vector_shapes(config, target.inputs, target.outputs).items()
    }


def _control_misfits(pipe: DiffusionPipeline, file: AdapterFile) -> list[str]:
    """What keeps the file's control encoder from fitting, one line per problem."""
    if file.control is None:
        return []
    try:
        place, factor = control_place(pipe)
        width, made = first_width(denoiser_of(pipe), place), file.control.config.out_channels
    except ValueError as error:
        return [f"  {CONTROL}: {error}"]
    problems = [] if width == made else [f"  {CONTROL}: it makes {made} channels, the first layer has {width}"]
    if factor != file.control.vae_factor:
        own = file.control.vae_factor
        problems.append(f"  {CONTROL}: made for {own} pixels per feature, the pipeline has {factor}")
    return problems
