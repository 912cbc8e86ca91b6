"""What the settings of all studies share: the share of the jobs, and how prompts are encoded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ether_diffusion.families.settings import FamilySettings

OF_A_PROGRAM = ("dry_run", "quiet", "log_level")
"""Settings of a training program's console, which the trainings of a study do not have."""
ENCODING = ("prompt_chunks", "max_sequence_length")
"""Settings of a training that say how prompts are encoded, for its pictures, too."""


def shared_encoding(training: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> FamilySettings:
    """The encoding of the prompts of all pictures, by the settings of training that all arms share.

    It is one for the base and for all arms, or their pictures could not be compared.

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


def share_of(shard: str | None) -> tuple[int, int]:
    """Which of how many shards, from 0: 3/16 is (2, 16); everything where no shard is named.

    Raises:
        ValueError: it is no such share.
    """
    if shard is None:
        return 0, 1
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard, re.ASCII)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"shard is {shard!r}: write which of how many, from 1/16 to 16/16")
    return int(found[1]) - 1, int(found[2])
