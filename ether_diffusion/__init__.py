"""Finetune diffusion models with hyperplane reflections: ETHER and ETHER+ (arXiv 2405.20271).

A public name is imported when it is first used: ``import ether_diffusion`` alone imports neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ether_diffusion.config import EtherConfig
    from ether_diffusion.control.pipeline import StableDiffusionControlPipeline, controlled
    from ether_diffusion.core.adapter import Adapter
    from ether_diffusion.core.host import attach
    from ether_diffusion.export.factors import ExportError
    from ether_diffusion.pipelines.file import AdapterFileError
    from ether_diffusion.pipelines.loaded import AdapterInfo, adapters
    from ether_diffusion.pipelines.prompts import encode_prompts
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
    from ether_diffusion.runs.export import export_lora
    from ether_diffusion.runs.hub import push_to_hub

    __version__: str

__all__ = [
    "Adapter",
    "AdapterFileError",
    "AdapterInfo",
    "EtherConfig",
    "ExportError",
    "StableDiffusionControlPipeline",
    "adapters",
    "attach",
    "controlled",
    "disable",
    "disabled",
    "enable",
    "encode_prompts",
    "export_lora",
    "fuse",
    "load",
    "push_to_hub",
    "save",
    "set_adapters",
    "unfuse",
    "unload",
]

_HOMES = {
    "Adapter": "core.adapter",
    "AdapterFileError": "pipelines.file",
    "AdapterInfo": "pipelines.loaded",
    "EtherConfig": "config",
    "ExportError": "export.factors",
    "StableDiffusionControlPipeline": "control.pipeline",
    "adapters": "pipelines.loaded",
    "attach": "core.host",
    "controlled": "control.pipeline",
    "encode_prompts": "pipelines.prompts",
    "export_lora": "runs.export",
    "push_to_hub": "runs.hub",
}
"""The module of every public name; the other names are verbs."""
_VERBS = "pipelines.verbs"
_ROOMS = ("config", "control", "core", "data", "files", "pipelines", "playground")
"""Modules that ``ether_diffusion.<name>`` reaches without an import of their own."""


if not TYPE_CHECKING:  # type checkers would take every misspelt name for one that this function knows

    def __getattr__(name: str) -> object:
        """Import what ``name`` stands for, once."""
        if name == "__version__":
            from importlib.metadata import version

            value = version("ether-diffusion")
        elif name in __all__:
            value = getattr(import_module(f"{__name__}.{_HOMES.get(name, _VERBS)}"), name)
        elif name in _ROOMS:
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
