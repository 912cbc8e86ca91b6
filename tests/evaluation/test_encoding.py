"""Base and arms of a study encode prompts alike, in as many chunks as the training says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.evaluation.mixing.settings import MixingConfig
from ether_diffusion.evaluation.runner import Job
from ether_diffusion.evaluation.settings import not_the_default, shared_encoding
from ether_diffusion.evaluation.subjects.arms import settings_hash
from ether_diffusion.evaluation.subjects.protocols import Subject
from ether_diffusion.evaluation.subjects.settings import BASE, BenchmarkConfig
from ether_diffusion.families.settings import FamilySettings

TRAINING = {"pretrained_model_name_or_path": "base"}


def test_the_training_says_how_prompts_are_encoded() -> None:
    assert shared_encoding(TRAINING, {}) == FamilySettings()
    asked = {"prompt_chunks": 2, "max_sequence_length": 128}
    assert shared_encoding(TRAINING | asked, {"a": {}}) == FamilySettings(max_sequence_length=128, prompt_chunks=2)


def benchmark(training: dict[str, Any], arms: dict[str, Any]) -> object:
    return BenchmarkConfig(Path("x"), training=training, arms=arms)


def mixing(training: dict[str, Any], arms: dict[str, Any]) -> object:
    return MixingConfig(Path("x"), arms, training, [["striped-robot", "dotted-fish"]])


@pytest.mark.parametrize("study", [benchmark, mixing])
def test_an_encoding_that_base_and_arms_would_not_share_is_refused(study: Callable[..., object]) -> None:
    study(TRAINING | {"prompt_chunks": 2}, {"a": {}})
    with pytest.raises(ValueError, match="prompt_chunks=auto would leave the base another number"):
        study(TRAINING | {"prompt_chunks": "auto"}, {"a": {}})
    with pytest.raises(ValueError, match="arm a: prompt_chunks is shared by all arms and the base"):
        study(TRAINING, {"a": {"prompt_chunks": 2}})
    with pytest.raises(ValueError, match="prompt_chunks must be from 1 to 64, not 0"):
        study(TRAINING | {"prompt_chunks": 0}, {"a": {}})


def test_pictures_of_another_encoding_are_others(tmp_path: Path) -> None:
    """Those of the base, too, which has no settings of a training; without chunks the hash is what it was."""
    subject = Subject("dog", "dog", tmp_path, ("a {token} dog",), ())
    hashes = {}
    for chunks in (None, 1, 2, 3):
        given = {} if chunks is None else {"prompt_chunks": chunks}
        config = BenchmarkConfig(tmp_path, training=TRAINING | given)
        hashes[chunks] = settings_hash(Job(BASE, {}, subject, 0), config)
    assert hashes[None] == hashes[1]
    assert len({*hashes.values()}) == 3
    assert not_the_default(FamilySettings()) == {}
