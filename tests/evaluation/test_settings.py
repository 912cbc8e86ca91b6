"""Base and arms of a study encode prompts alike, in as many chunks as the training says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from ether_diffusion.config import LoraFormat
from ether_diffusion.evaluation.controls.settings import ControlStudyConfig
from ether_diffusion.evaluation.mixing.settings import MixingConfig
from ether_diffusion.evaluation.paper.perturbation import KINDS
from ether_diffusion.evaluation.paper.settings import PERTURBED, BlocksConfig
from ether_diffusion.evaluation.runner import Job
from ether_diffusion.evaluation.settings import not_the_default, share_of, shared_encoding
from ether_diffusion.evaluation.subjects.arms import settings_hash
from ether_diffusion.evaluation.subjects.protocols import Subject
from ether_diffusion.evaluation.subjects.settings import BASE, BenchmarkConfig
from ether_diffusion.families.registry import FAMILIES
from ether_diffusion.families.settings import FamilySettings
from ether_diffusion.metrics.control_tasks.flags import MAKERS
from ether_diffusion.metrics.names import TASKS

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


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "1/0", "-1/3", "1/3/5", "a/b", "１/３", "1 /3", ""])
def test_a_shard_that_is_none_is_refused(shard: str) -> None:
    with pytest.raises(ValueError, match="write which of how many, from 1/16 to 16/16"):
        share_of(shard)


@pytest.mark.parametrize(
    "study",
    [
        lambda shard: BenchmarkConfig(Path("x"), training=TRAINING, shard=shard),
        lambda shard: MixingConfig(Path("x"), {}, TRAINING, [["striped-robot", "dotted-fish"]], shard=shard),
        lambda shard: ControlStudyConfig(Path("x"), {"a": {}}, {"train_data_dir": "playground"}, shard=shard),
    ],
    ids=["benchmark", "two adapters", "controls"],
)
def test_every_study_refuses_it_with_its_settings(study: Callable[[str], object]) -> None:
    study("3/5")
    with pytest.raises(ValueError, match="write which of how many"):
        study("5/3")


def test_an_arm_that_is_none_of_this_librarys_methods_has_no_blocks_to_study() -> None:
    assert BlocksConfig(Path("x"), training=TRAINING, arms={"a": {"n_blocks": 16}}).adapters["a"].n_blocks == 16
    with pytest.raises(ValueError, match=r"arm a: blocks are studied for ether, .*, not lora"):
        BlocksConfig(Path("x"), training=TRAINING, arms={"a": {"method": "lora"}})


def test_what_is_offered_is_what_there_is() -> None:
    assert set(TASKS) == set(MAKERS)
    assert set(PERTURBED) == set(KINDS)
    assert set(get_args(LoraFormat)) == {kind for family in FAMILIES.values() for kind in family.LORA_FORMATS}
