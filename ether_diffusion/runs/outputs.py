"""Where the result goes is checked before the first step, not found out after the last."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ether_diffusion.runs.written import MODEL_FILES, RECORD, RUN_FILES, RUN_FOLDERS

LONGEST = (
    f"checkpoints/.step-0000000.tmp/text_encoder_2/.ether_weights.safetensors.{'0' * 32}.tmp",
    f"cache/.{'0' * 64}.safetensors.{'0' * 32}.tmp",
    ".pipeline-00000000/text_encoder_2/model-00001-of-00002.safetensors",
    f"samples/.step-0000000.{'0' * 32}.tmp/0000.png",
)
"""The longest paths that a run makes in its folder, temporary names included."""


def check_outputs(folder: Path, repository: str | None) -> None:
    """See that all that a run will write can get its name; leaves nothing behind.

    Args:
        folder: the run folder; one that is not there yet is not tried out.
        repository: of the Hub, to which the run is to be uploaded.

    Raises:
        OSError: a name is taken by a folder or file, too long, or cannot be written.
        ValueError: the Hub or a text file does not take the name.
    """
    whole = folder.resolve()
    try:
        str(whole).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"--output_dir {str(folder)!r} is no text that report and card can name: rename it") from error
    for name in (RECORD, *RUN_FOLDERS):
        if (folder / name).is_symlink():
            raise OSError(f"{folder / name} is a link, and the run would write to where it leads: remove it")
    for name in (RECORD, *RUN_FILES):
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder, where the run writes a file: move it away")
    for name in (*RUN_FOLDERS, *(name for name in MODEL_FILES if "." not in name)):
        path = folder / name
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is a file, where the run writes a folder: move it away")
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"{path} cannot be written: change its permissions, or choose another --output_dir")
    if repository is not None:
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise ValueError(
                f"the Hub takes no repository named {repository!r}: give another --hub_model_id ({error})"
            ) from error
    if folder.is_dir():
        _try_names(folder)


def _try_names(folder: Path) -> None:
    """Make the longest names below a folder with a short name of its own."""
    place = None
    try:
        place = Path(tempfile.mkdtemp(dir=folder.resolve(), prefix="."))
        for name in LONGEST:
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    except OSError as error:
        raise OSError(
            f"cannot write the result to --output_dir {folder}: {error.strerror or error}; choose another"
        ) from error
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
