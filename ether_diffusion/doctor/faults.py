"""What is amiss on a machine, and the remedy of each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants

from ether_diffusion.doctor.bases import KnownBase
from ether_diffusion.doctor.devices import Device
from ether_diffusion.doctor.packages import DISTRIBUTION, Extra, installed_version, unmet
from ether_diffusion.reading import read_yaml
from ether_diffusion.training.sharding import sharded_by_config, sharded_by_environment


@dataclass(frozen=True)
class Fault:
    """Something amiss.

    Attributes:
        what: it is.
        remedy: what to do.
        stops: whether a training stops at it; otherwise it is good to know.
    """

    what: str
    remedy: str
    stops: bool = False


def faults(extras: Sequence[Extra], devices: Sequence[Device], bases: Sequence[KnownBase]) -> list[Fault]:
    """All that is amiss, what stops a training first."""
    found = [*_packages(extras), *_devices(devices), *_launcher(), *_hub(bases)]
    return sorted(found, key=lambda fault: not fault.stops)


def _packages(extras: Sequence[Extra]) -> list[Fault]:
    found = [
        Fault(f"a package is missing or of another version: {need}", f"pip install -U {DISTRIBUTION}", stops=True)
        for need in unmet()
    ]
    for extra in extras:
        if extra.begun and extra.missing:
            what = f"the extra {extra.name} is only in part there, without {', '.join(extra.missing)}"
            found.append(Fault(what, extra.command))
    if installed_version("bitsandbytes") and not installed_version("kernels"):
        found.append(
            Fault(
                'bitsandbytes says "Failed to load CPU gemm_4bit_forward from kernels-community": it is harmless',
                "leave it; or pip install kernels, which downloads a faster way for nf4 on CPUs",
            )
        )
    return found


def _devices(devices: Sequence[Device]) -> list[Fault]:
    """An accelerator that torch does not reach."""
    if not all(device.is_cpu for device in devices):
        return []
    if torch.version.cuda is not None:
        return [
            Fault(
                f"torch is built for CUDA {torch.version.cuda} and finds no GPU",
                "see that nvidia-smi lists one, that its driver is new enough, and what CUDA_VISIBLE_DEVICES says",
            )
        ]
    if shutil.which("nvidia-smi"):
        return [
            Fault(
                f"there is a driver of NVIDIA, and torch {torch.__version__} has no CUDA",
                "install the build of torch for your CUDA version, by the command that pytorch.org gives",
            )
        ]
    return []


def _launcher() -> list[Fault]:
    """Sharding, which the environment or Accelerate's own settings ask for."""
    remedy = "train in one process, or in several with accelerate launch --multi_gpu (DDP)"
    if (found := sharded_by_environment(os.environ)) is not None:
        variable, name = found
        return [Fault(f"{variable} is set: {name} is not supported", f"unset it; {remedy}", stops=True)]
    for path in (Path(constants.HF_HOME) / "accelerate" / f"default_config.{kind}" for kind in ("yaml", "json")):
        if path.is_file():
            settings = read_yaml(path)  # JSON is YAML
            kind = str(settings.get("distributed_type", "")) if isinstance(settings, dict) else ""
            if (shards := sharded_by_config(kind)) is not None:
                what = f"accelerate launch shards by its settings {path}, and {shards} is not supported"
                return [Fault(what, f"ether train starts without it; or run accelerate config again: {remedy}")]
    return []


def _hub(bases: Sequence[KnownBase]) -> list[Fault]:
    found = []
    for base in bases:
        if base.state == "incomplete":
            what = f"{base.name} is in part downloaded, without {', '.join(base.lacks)}"
            found.append(Fault(what, f"hf download {base.name}"))
    if constants.HF_HUB_OFFLINE and (absent := [base.name for base in bases if base.state in ("absent", "incomplete")]):
        what = f"HF_HUB_OFFLINE is set: bases that are not here cannot be fetched, such as {absent[0]}"
        found.append(Fault(what, "unset it, or name a folder as --pretrained_model_name_or_path"))
    return found
