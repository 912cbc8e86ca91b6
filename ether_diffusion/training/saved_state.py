"""Files of a checkpoint that ``torch.save`` wrote: read without executing anything."""

from __future__ import annotations

import zipfile
from _codecs import encode
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ether_diffusion.pipelines.file import first_line
from ether_diffusion.reading import shown

NUMPY_TYPES: list[Any] = [encode, np.zeros(0).__reduce__()[0], np.ndarray, np.dtype, np.dtypes.UInt32DType]
"""What a saved state of NumPy's random generator is made of; the second makes an empty array and has no public name."""


LARGEST = 2**62
"""No number of a run's state is as large."""


def unlike(found: Any, own: Any, where: str = "") -> str | None:
    """What of a saved state is not of the kind of the state that it is to replace; None if all is.

    Tensors have the same shapes and finite values, numbers are below :data:`LARGEST`; keys that one of them has alone
    are passed over, and so is what is None on one side.

    Args:
        found: the saved state, or a part of it.
        own: the same part of the present one.
        where: the name of the part.
    """
    if found is None or own is None:
        return None
    if isinstance(own, Mapping):
        if not isinstance(found, Mapping):
            return f"{where or 'it'} is {shown(found)}, no table"
        parts = [(found[key], own[key], f"{where}.{key}".lstrip(".")) for key in own if key in found]
    elif isinstance(own, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(own):
            return f"{where} is {shown(found)}, {len(own)} values are expected"
        parts = [(each, like, f"{where}.{place}") for place, (each, like) in enumerate(zip(found, own, strict=True))]
    elif isinstance(own, Tensor):
        if not isinstance(found, Tensor) or found.shape != own.shape:
            size = tuple(found.shape) if isinstance(found, Tensor) else shown(found)
            return f"{where} is {size}, a tensor of {tuple(own.shape)} is expected"
        return None if bool(found.isfinite().all()) else f"{where} has values that are not finite"
    elif isinstance(own, bool) or not isinstance(own, int | float):
        return None if isinstance(found, type(own)) else f"{where} is {shown(found)}"
    else:
        number = isinstance(found, int | float) and not isinstance(found, bool)
        fits = number and (abs(found) < LARGEST or found == own)  # prodigy's growth_rate is infinite
        return None if fits else f"{where} is {shown(found)}, a number is expected"
    return next((wrong for each in parts if (wrong := unlike(*each))), None)


def read_saved(path: Path) -> dict[str, Any]:
    """The dictionary of tensors and plain values in a file of ``torch.save``, on the CPU.

    A file of another format is refused unread; a reference to any type but those of tensors and NumPy's arrays is an
    error, so nothing in the file is called.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds what this toolkit does not write.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint is incomplete")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is refused unread: it is not a file that torch.save wrote (a raw pickle is not read)")
    try:
        with torch.serialization.safe_globals(NUMPY_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is refused: it is damaged, or holds more than tensors and plain values ({first_line(error)})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is refused: it holds a {type(content).__name__}, not the state of a run")
    return content
