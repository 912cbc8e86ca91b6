"""Write adapters of a pipeline as one exact LoRA file, and check it before it has its name."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from ether_diffusion.config import FloatDtype
from ether_diffusion.export.factors import ExportError, lora_layers
from ether_diffusion.export.metadata import describe
from ether_diffusion.export.names import keys_of, tensors_of
from ether_diffusion.export.tokens import check_tokens, write_tokens
from ether_diffusion.export.verify import Verified, verify
from ether_diffusion.families.registry import family_of
from ether_diffusion.files import new_path
from ether_diffusion.pipelines.loaded import adapters, control_in
from ether_diffusion.pipelines.new_tokens import new_tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

TOLERANCE: Mapping[str, float] = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5}
"""What a file's dtype may cost, as a share of the effect of a layer."""


@dataclass(frozen=True)
class Exported:
    """A LoRA file that was written.

    Attributes:
        path: where.
        format: whose names its keys are.
        layers: how many.
        rank: the largest.
        size: bytes.
        verified: how far it is from the adapter.
        embeds: files beside it with the embeddings of new tokens.
    """

    path: Path
    format: str
    layers: int
    rank: int
    size: int
    verified: Verified
    embeds: tuple[Path, ...] = ()

    def __str__(self) -> str:
        """In one line."""
        return (
            f"{self.path}: {self.layers} layers of rank {self.rank} at most, {self.size / 1e6:.1f} MB, format "
            f"{self.format}; read back ({self.verified.loaded} layers by diffusers itself), it differs by "
            f"{self.verified.difference:.1e} of the effect ({self.verified.effect:.2g} of the input)"
        )


def export_lora(
    pipe: DiffusionPipeline,
    path: str | Path,
    format: str = "diffusers",
    name: str | Sequence[str] | None = None,
    strength: float | Sequence[float] = 1.0,
    dtype: FloatDtype = "float16",
    told: Mapping[str, str] | None = None,
    base: str | None = None,
) -> Exported:
    """Write adapters as one LoRA file that does what they do, W + Σ s ΔW, on this base.

    A LoRA has no place for the embeddings of a new token: they are written beside it, as
    :func:`ether_diffusion.export.tokens.embeds_paths` names them.

    Args:
        pipe: the pipeline that the adapters are loaded in, neither fused nor quantised.
        path: of the new file.
        format: diffusers; kohya, for SD and SDXL; comfyui; original, the layers of the authors' code.
        name: the adapter, or several; those that are loaded where none is named.
        strength: s of each, or of all.
        dtype: of the file: float16 costs some 5e-4 of the effect, bfloat16 2e-3 to 5e-3, float32 nothing.
        told: more entries of the file's header.
        base: what the base is called there.

    Returns:
        What was written, and how far it is from the adapter.

    Raises:
        ExportError: the adapter has no low rank, the base cannot be read, the family has no such format, or the file
            does not do what the adapter does; nothing is written then.
        FileExistsError: the path exists, or other embeddings are where those of a new token belong.
        RuntimeError: adapters are fused.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already: name another file, or remove it")
    if dtype not in TOLERANCE:
        raise ExportError(f"dtype {dtype!r} is none of {', '.join(TOLERANCE)}")
    if path.suffix != ".safetensors":
        raise ExportError(f"{path}: the file's name must end in .safetensors")
    strengths = _strengths(pipe, name, strength)
    tokens = {embeds.token: embeds for name, embeds in new_tokens(pipe).items() if name in strengths}
    check_tokens(path, tokens)
    family = family_of(pipe)
    layers = {f"{layer.component}.{layer.path}": layer for layer in lora_layers(pipe, strengths)}
    if not layers:
        raise ExportError("there is nothing to export: no adapter acts on a projection at a strength but 0")
    keys = keys_of(layers, family, format)
    tensors = {key: _stored(value, dtype, key) for key, value in tensors_of(layers, keys).items()}
    header = describe(pipe, family, strengths, layers, format, base) | dict(told or {})
    with new_path(path) as temporary:
        temporary.write_bytes(serialize(tensors, metadata=header))
        verified = verify(family, layers, keys, temporary)
        if verified.difference > TOLERANCE[dtype]:
            raise ExportError(
                f"read back, the file differs by {verified.difference:.1e} of the effect of a layer, and "
                f"{dtype} may cost {TOLERANCE[dtype]:.0e}: it is not written; try dtype float32"
            )
        embeds = write_tokens(path, tokens)
    for token, beside in zip(tokens, embeds, strict=True):
        logger.warning(
            "the new token %s is no part of a LoRA: keep %s beside it, which diffusers loads by "
            "pipe.load_textual_inversion, ComfyUI from its folder of embeddings (docs/tokens.md)",
            *(token, beside),
        )
    rank = max(each.rank for each in layers.values())
    return Exported(path, format, len(layers), rank, path.stat().st_size, verified, tuple(embeds))


def _strengths(
    pipe: DiffusionPipeline, name: str | Sequence[str] | None, strength: float | Sequence[float]
) -> dict[str, float]:
    """The adapters with their strengths.

    Raises:
        ExportError: none is loaded, or another number of strengths than of names.
    """
    names = list(adapters(pipe)) if name is None else [name] if isinstance(name, str) else list(name)
    if not names:
        raise ExportError("no adapter is loaded in this pipeline: load one with ether.load")
    each = [float(s) for s in strength] if isinstance(strength, Sequence) else [float(strength)] * len(names)
    if len(each) != len(names):
        raise ExportError(f"{len(names)} adapters but {len(each)} strengths: give one each, or a single number")
    if len(set(names)) != len(names):
        raise ExportError(f"an adapter is named twice in {names}")
    if not all(map(math.isfinite, each)):
        raise ExportError(f"strengths must be finite numbers, not {each}")
    control = control_in(pipe)
    for name in (name for name in names if control is not None and name in control.encoders):
        logger.warning("%s has a control encoder, which is no part of a LoRA: it stays in the ETHER file", name)
    return dict(zip(names, each, strict=True))


def _stored(value: Tensor, dtype: FloatDtype, key: str) -> Tensor:
    """A tensor in the dtype of the file.

    Raises:
        ExportError: it is too large for the dtype.
    """
    stored = value.to(getattr(torch, dtype)).contiguous()
    if not stored.isfinite().all():
        raise ExportError(f"{key} has numbers that {dtype} cannot hold: export with dtype float32")
    return stored
