"""Files of a checkpoint that ``torch.save`` wrote: read without executing anything."""

from __future__ import annotations

import zipfile
from _codecs import encode
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from ether_diffusion.pipelines.file import first_line

NUMPY_TYPES: list[Any] = [encode, np.zeros(0).__reduce__()[0], np.ndarray, np.dtype, np.dtypes.UInt32DType]
"""What a saved state of NumPy's random generator is made of; the second makes an empty array and has no public name."""


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
