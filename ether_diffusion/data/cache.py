"""Tensors that are dear to compute and never change (latents, prompt embeddings), by what they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from ether_diffusion.files import atomic_path

logger = logging.getLogger(__name__)

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


class TensorCache:
    """A cache of named tensors in memory and, given a ``folder``, in one safetensors file per key.

    Files carry their key and a hash of their tensors, and are written atomically: several processes may share
    a folder, and a file that was cut short or altered is computed again.

    Args:
        folder: where the files are; made at the first write. ``None`` keeps tensors in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, dict[str, torch.Tensor]] = {}

    def get_or_compute(
        self, key: Mapping[str, JSON], compute: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of ``key``, calling ``compute`` only where they are not in the cache.

        The tensors are detached, contiguous and on the CPU, wherever ``compute`` left them; their dtypes are
        kept. They are shared between calls: do not change them in place.

        Raises:
            TypeError: ``key`` holds something that JSON has no word for.
            ValueError: ``key`` holds a NaN or an infinity.
            OSError: the file cannot be written.
        """
        text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
        if text not in self._memory:
            self._memory[text] = self._from_disk_or_compute(text, compute)
        return dict(self._memory[text])

    def _from_disk_or_compute(
        self, text: str, compute: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        path = None if self.folder is None else self.folder / f"{_sha256(text)}.safetensors"
        if path is not None and path.exists():
            try:
                return _read(path, text)
            except (SafetensorError, OSError, ValueError) as error:
                logger.warning("cache file %s is not usable (%s); computing it again", path, error)
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in compute().items()
        }
        if path is not None:
            with atomic_path(path) as temporary:
                temporary.write_bytes(serialize(tensors, metadata={"key": text, "sha256": tensors_hash(tensors)}))
        return tensors


def module_hash(module: torch.nn.Module) -> str:
    """Return a sha256 of a module's state dict: names, dtypes, shapes and bytes, on whatever device they are.

    Raises:
        ValueError: a tensor is on the meta device.
    """
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a sha256 of the names, dtypes, shapes and bytes of ``tensors``, in the order of their names.

    Raises:
        ValueError: a tensor is on the meta device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            raise ValueError(f"tensor {name!r} is on the meta device and has no bytes to hash; load it first")
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # bfloat16 is unknown to numpy; its bytes are not
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, text: str) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if metadata.get("key") != text:
        raise ValueError("it holds another key")
    if metadata.get("sha256") != tensors_hash(tensors):
        raise ValueError("its tensors were altered")
    return tensors


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
