"""Whether an adapter file fits a pipeline: everything is checked before anything is attached."""

from __future__ import annotations

import logging
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from ether_diffusion.adapter import Adapter, check_blocks, state_problems
from ether_diffusion.attention import find_targets
from ether_diffusion.checkpoint import CONTROL, AdapterFile, AdapterFileError
from ether_diffusion.fingerprint import base_hash

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 8


def refuse_misfits(pipe: DiffusionPipeline, file: AdapterFile, source: str | Path) -> None:
    """Raise AdapterFileError with all that keeps the file from fitting the pipeline, if anything does."""
    problems = [p for component in file.configs for p in _misfits(component, getattr(pipe, component, None), file)]
    problems += _control_misfits(pipe, file)
    if problems:
        shown = "\n".join(problems[:SHOWN_PROBLEMS])
        rest = f"\n  … and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        made_for = f" (it was trained on {file.base_model})" if file.base_model else ""
        raise AdapterFileError(f"{source} does not fit this {type(pipe).__name__}{made_for}:\n{shown}{rest}")


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


def _misfits(component: str, module: nn.Module | None, file: AdapterFile) -> list[str]:
    """What keeps the file's vectors for one component from fitting, one line per problem."""
    if module is None:
        return [f"  the pipeline has no {component}, which the file has vectors for"]
    config = file.configs[component]
    try:
        targets = find_targets(module, config.targets)
        check_blocks(targets, config)
    except ValueError as error:
        return [f"  {component}: {error}"]
    expected = Adapter(config, targets, "expected").state_dict()
    return [f"{p.replace(': ', f': {component}.', 1)}" for p in state_problems(file.states[component], expected)]


def _control_misfits(pipe: DiffusionPipeline, file: AdapterFile) -> list[str]:
    """What keeps the file's control encoder from fitting, one line per problem."""
    if file.control is None:
        return []
    unet = getattr(pipe, "unet", None)
    if unet is None:
        return ["  the pipeline has no unet, which the file has a control encoder for"]
    width, made = unet.conv_in.out_channels, file.control.config.out_channels
    problems = [] if width == made else [f"  {CONTROL}: it makes {made} channels, the unet's first layer has {width}"]
    if (factor := pipe.vae_scale_factor) != file.control.vae_factor:
        problems.append(f"  {CONTROL}: made for {file.control.vae_factor} pixels per latent, the pipeline has {factor}")
    return problems
