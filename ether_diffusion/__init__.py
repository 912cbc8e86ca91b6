"""Finetune diffusion models with hyperplane reflections: ETHER and ETHER+ (arXiv 2405.20271)."""

from importlib.metadata import version

from ether_diffusion.config import EtherConfig
from ether_diffusion.control.pipeline import StableDiffusionControlPipeline, controlled
from ether_diffusion.core.adapter import Adapter
from ether_diffusion.core.host import attach
from ether_diffusion.pipelines.file import AdapterFileError
from ether_diffusion.pipelines.loaded import AdapterInfo, adapters
from ether_diffusion.pipelines.verbs import (
    disable,
    disabled,
    enable,
    fuse,
    load,
    save,
    set_adapters,
    unfuse,
    unload,
)

__version__ = version("ether-diffusion")

__all__ = [
    "Adapter",
    "AdapterFileError",
    "AdapterInfo",
    "EtherConfig",
    "StableDiffusionControlPipeline",
    "adapters",
    "attach",
    "controlled",
    "disable",
    "disabled",
    "enable",
    "fuse",
    "load",
    "save",
    "set_adapters",
    "unfuse",
    "unload",
]
