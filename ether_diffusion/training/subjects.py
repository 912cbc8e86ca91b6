"""Several subjects in one run: each folder of photos has its own settings, as if it were trained alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ether_diffusion.images import check_folder
from ether_diffusion.reading import read_text
from ether_diffusion.runs.written import NAMES
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

PROMPT_FILE = "prompt.txt"
"""In a subject's folder: its instance prompt."""
SUBJECT = "{subject}"
"""Stands for the folder's name in the prompts."""


def subjects_of(config: DreamBoothConfig) -> dict[str | None, DreamBoothConfig]:
    """The settings of every subject by its name; the settings themselves, without a name, where there is but one.

    The settings of a subject are those with which training it alone gives the same weights.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: it holds no folders, or a name that no adapter can have.
    """
    if config.subjects_dir is None:
        return {None: config}
    folders = sorted(path for path in check_folder(config.subjects_dir).iterdir() if path.is_dir())
    folders = [path for path in folders if not path.name.startswith(".")]
    if not folders:
        raise ValueError(f"{config.subjects_dir} holds no folders: it should have one with photos for each subject")
    if dotted := [path.name for path in folders if "." in path.name]:
        raise ValueError(f"the folder of a subject gives its adapter its name, which cannot have a dot: {dotted[0]}")
    if taken := [path.name for path in folders if path.name in (*NAMES, "cache")]:
        raise ValueError(f"a subject's folder cannot be called {taken[0]}, which is a run's own name: rename it")
    return {path.name: _alone(config, path) for path in folders}


def _alone(config: DreamBoothConfig, folder: Path) -> DreamBoothConfig:
    """The settings that train one of the subjects alone."""
    name = folder.name.replace("_", " ")
    written = folder / PROMPT_FILE
    prompt = read_text(written).strip() if written.exists() else config.instance_prompt
    return replace(
        config,
        subjects_dir=None,
        resume=None,
        instance_data_dir=folder,
        output_dir=config.output_dir / folder.name,
        cache_dir=config.cache_dir or config.output_dir / "cache",
        instance_prompt=prompt.replace(SUBJECT, name),
        class_prompt=None if config.class_prompt is None else config.class_prompt.replace(SUBJECT, name),
        class_data_dir=None if config.class_data_dir is None else config.class_data_dir / folder.name,
        hub_model_id=None if config.hub_model_id is None else f"{config.hub_model_id}-{folder.name}",
        validation_prompt=[each.replace(SUBJECT, name) for each in config.validation_prompt],
    )
