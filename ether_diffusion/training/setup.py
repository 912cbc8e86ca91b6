"""What every training program does first: packages, Accelerate, caches, the modules' modes."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import nn

from ether_diffusion.families.protocol import Family
from ether_diffusion.training.base_model import DTYPES
from ether_diffusion.training.sections import ComputeSection
from ether_diffusion.training.sharding import sharded_by_environment

logger = logging.getLogger(__name__)

NOT_COMPILED_ON = ("cpu",)
"""With torch 2.13, gradients of a UNet's attention weights are off by two thirds there, without any adapter."""


def make_accelerator(section: ComputeSection) -> Accelerator:
    """Accelerate as the section asks for, or as ``accelerate launch`` was configured.

    Raises:
        ImportError: a tracker is not installed, or what the method or the optimiser need.
        ValueError: a precision that is not supported, or compilation on a CPU.
    """
    check_installed(section)
    _check_launch(os.environ)
    if section.guessed_rate:
        logger.warning(
            "learning_rate %g for %s is a guess (a related method's): try several --learning_rate",
            section.resolved_learning_rate,
            section.entry.name,
        )
    if section.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    # the last layer of a text encoder has no part in SDXL's embeddings, nor the second one's in the pooled one; a
    # placeholder token may be in no prompt of a batch
    unused = DistributedDataParallelKwargs(find_unused_parameters=section.encodes_prompts)
    accelerator = Accelerator(
        mixed_precision=section.mixed_precision,
        gradient_accumulation_steps=section.gradient_accumulation_steps,
        log_with=list(section.report_to) or None,
        project_dir=section.output_dir,
        # the other processes wait while the main one draws samples
        kwargs_handlers=[unused, InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    started = int(os.environ.get("WORLD_SIZE", accelerator.num_processes))
    if started != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE is {started}, but Accelerate trains in {accelerator.num_processes} process: each would train "
            "alone in the same folder; on CPUs set ACCELERATE_USE_CPU=true, or start with accelerate launch --cpu"
        )
    if accelerator.mixed_precision not in DTYPES:
        raise ValueError(f"mixed_precision={accelerator.mixed_precision} is not supported: use {', '.join(DTYPES)}")
    if section.torch_compile and accelerator.device.type in NOT_COMPILED_ON:
        raise ValueError("torch_compile trains on GPUs only: on CPUs its gradients are wrong; leave it out")
    # only dropout, where a base has any, draws from the global generators
    set_seed(section.seed, device_specific=True)
    return accelerator


def _check_launch(environment: Mapping[str, str]) -> None:
    """Refuse what ``accelerate launch`` was configured for and this toolkit does not train under.

    Raises:
        ValueError: FSDP, DeepSpeed or Megatron-LM; checkpoints and adapters would not be what they should.
    """
    if (found := sharded_by_environment(environment)) is not None:
        variable, name = found
        raise ValueError(
            f"{name} is not supported ({variable} is set by accelerate launch or its config file): "
            "train in one process, or in several with --multi_gpu (DDP)"
        )


def check_installed(section: ComputeSection) -> None:
    """Look for the optional packages that ``section`` needs, before anything is loaded or written.

    Raises:
        ImportError: one is missing; the message says how to install it.
    """
    needed = [(f"report_to={tracker}", tracker, tracker) for tracker in section.report_to]
    if section.optimizer == "adamw8bit":
        needed.append(("optimizer=adamw8bit", "bitsandbytes", "adam8bit"))
    if section.optimizer == "prodigy":
        needed.append(("optimizer=prodigy", "prodigyopt", "prodigy"))
    if section.base_quantization in ("nf4", "int8"):
        needed.append((f"base_quantization={section.base_quantization}", "bitsandbytes", "quantization"))
    if section.entry.needs_peft:
        needed.append((f"method={section.entry.name}", "peft", "study"))
    for setting, package, extra in needed:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{setting} needs {package}: pip install 'ether-diffusion[{extra}]'")


def prepare_modules(family: Family, section: ComputeSection) -> None:
    """Gradient checkpointing and compilation of what takes part in training.

    Raises:
        ValueError: gradient checkpointing would change what the denoiser answers.
    """
    denoisers = [part for part in (family.denoiser, getattr(family.pipe, "controlnet", None)) if part is not None]
    if section.gradient_checkpointing:
        if family.CHECKPOINTING is not None:
            raise ValueError(f"{family.TITLE} cannot be trained with gradient_checkpointing: {family.CHECKPOINTING}")
        for denoiser in denoisers:
            denoiser.enable_gradient_checkpointing()
        if section.train_text_encoder:
            for encoder in family.text_encoders.values():
                encoder.gradient_checkpointing_enable()  # type: ignore[operator]
    if section.torch_compile:
        for denoiser in denoisers:
            compile_denoiser(denoiser)


def compile_denoiser(denoiser: nn.Module) -> None:
    """Compile the blocks that a denoiser repeats, which takes a tenth of the time of the whole; the whole if none."""
    try:
        denoiser.compile_repeated_blocks()  # type: ignore[operator]
    except ValueError:  # diffusers does not know which they are
        denoiser.compile()
