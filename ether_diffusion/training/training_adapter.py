"""An adapter that acts in training and not in drawing, for bases that were distilled to few steps.

Training such a base directly undoes its distillation. Where another adapter undoes it already in training, what is
learnt can be used with the distilled base alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from ether_diffusion.core.host import host_of
from ether_diffusion.families.protocol import Family
from ether_diffusion.pipelines.file import FILE_NAME, first_line
from ether_diffusion.pipelines.loaded import adapters
from ether_diffusion.pipelines.schema import LORA_FILE
from ether_diffusion.pipelines.verbs import load
from ether_diffusion.runs.checksums import sha256

NAME = "training_adapter"


@dataclass(frozen=True)
class TrainingAdapter:
    """An adapter of the denoiser that is loaded beside what is trained.

    Attributes:
        hash: SHA-256 of its file.
        shared: whether it can act on all samples while each has an adapter of its own.
        switch: turns it on or off.
    """

    hash: str
    shared: bool
    switch: Callable[[bool], None]

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Within the context it does not act."""
        self.switch(False)
        try:
            yield
        finally:
            self.switch(True)


def training_adapter_file(path: Path) -> Path:
    """The file that a training adapter's setting names: itself, or of a folder that of an ETHER adapter or LoRA.

    Raises:
        FileNotFoundError: there is none.
    """
    found = next((each for each in (path, path / FILE_NAME, path / LORA_FILE) if each.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"training_adapter: {path} is neither a .safetensors file nor a folder with {FILE_NAME} or {LORA_FILE}"
        )
    return found


def is_ether(file: Path) -> bool:
    """Whether a file is an adapter of this library, by its header.

    Raises:
        ValueError: it is no safetensors file.
    """
    try:
        with safe_open(file, "pt") as opened:
            return "ether_config" in (opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"training_adapter: {file} cannot be read as safetensors ({first_line(error)}): name a LoRA or ETHER file"
        ) from None


def load_training_adapter(family: Family, path: Path) -> TrainingAdapter:
    """Load the LoRA or ETHER adapter at ``path`` into the family's pipeline, frozen and active.

    Args:
        family: of the base.
        path: a file, or a folder with one.

    Raises:
        AdapterFileError, FileNotFoundError: it is no adapter, or another base's.
        ImportError: it is a LoRA, and peft is not installed.
        ValueError: it acts on more than the denoiser.
    """
    file = training_adapter_file(path)
    own = is_ether(file)
    switch = _ether(family, file) if own else _lora(family, file)
    family.denoiser.requires_grad_(False)
    return TrainingAdapter(sha256(file), not own, switch)


def _ether(family: Family, file: Path) -> Callable[[bool], None]:
    load(family.pipe, file, NAME)
    host = host_of(family.denoiser)
    parts = adapters(family.pipe)[NAME].components
    if host is None or parts != (family.DENOISER,):
        raise ValueError(f"training_adapter: {file} acts on {', '.join(parts)}: it may act on the denoiser only")
    host.adapters[NAME].requires_grad_(False)

    def switch(active: bool) -> None:
        others = {name: strength for name, strength in host.strengths.items() if name != NAME}
        host.set_active({**others, NAME: 1.0} if active else others)

    return switch


def _lora(family: Family, file: Path) -> Callable[[bool], None]:
    if not hasattr(family.pipe, "load_lora_weights"):
        raise ValueError(
            f"training_adapter: diffusers loads no LoRA into {type(family.pipe).__name__}; give an ETHER file"
        )
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError("training_adapter: a LoRA needs peft: pip install 'ether-diffusion[study]'") from error
    try:
        family.pipe.load_lora_weights(str(file), adapter_name=NAME)
    except Exception as error:  # diffusers raises whatever its conversion of keys stumbles over
        raise ValueError(
            f"training_adapter: diffusers cannot load {file} into this base: {first_line(error)}"
        ) from error

    def layers(module: nn.Module) -> list[BaseTunerLayer]:
        return [each for each in module.modules() if isinstance(each, BaseTunerLayer)]

    if more := [name for name, encoder in family.text_encoders.items() if layers(encoder)]:
        raise ValueError(f"training_adapter: {file} acts on {', '.join(more)}: it may act on the denoiser only")
    if not (own := layers(family.denoiser)):
        raise ValueError(f"training_adapter: {file} acts on no layer of this base's denoiser")

    def switch(active: bool) -> None:
        for layer in own:
            layer.enable_adapters(active)
            layer.requires_grad_(False)  # peft turns gradients on with its adapters

    return switch
