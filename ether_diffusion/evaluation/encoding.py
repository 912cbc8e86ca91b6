"""How a study encodes prompts: one way for the base and for all arms, or their pictures could not be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ether_diffusion.families.settings import FamilySettings

ENCODING = ("prompt_chunks", "max_sequence_length")
"""Settings of a training that say how prompts are encoded, for its pictures, too."""


def shared_encoding(training: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> FamilySettings:
    """The encoding of the prompts of all pictures, by the settings of training that all arms share.

    Args:
        training: settings of train_dreambooth.py.
        arms: those of each arm.

    Raises:
        ValueError: the number of chunks is left to the captions, or an arm has one of its own.
    """
    for name, settings in arms.items():
        if "prompt_chunks" in settings:
            raise ValueError(f"arm {name}: prompt_chunks is shared by all arms and the base: set it in training")
    chunks = training.get("prompt_chunks", 1)
    if chunks == "auto":
        raise ValueError(
            "training: prompt_chunks=auto would leave the base another number than an arm: give the number"
        )
    return FamilySettings(max_sequence_length=training.get("max_sequence_length"), prompt_chunks=chunks)


def not_the_default(encoding: FamilySettings) -> dict[str, Any]:
    """What an encoding adds to the identity of pictures; nothing by default, so that older results stay valid."""
    return {} if encoding == FamilySettings() else {"encoding": asdict(encoding)}
