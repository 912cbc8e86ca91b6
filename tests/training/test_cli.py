"""The command line: a YAML file, every field a flag, the flag over the file, and mistakes answered with the remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

NEEDED = {
    "pretrained_model_name_or_path": "base",
    "output_dir": "runs/dog",
    "instance_data_dir": "dog",
    "instance_prompt": "a photo of qwe dog",
}
GIVEN = [f"--{name}={value}" for name, value in NEEDED.items()]

OTHER: dict[str, Any] = {
    "pretrained_model_name_or_path": "other/base",
    "output_dir": "runs/cat",
    "revision": "main",
    "variant": "fp16",
    "dry_run": True,
    "overwrite": True,
    "resume": "latest",
    "quiet": True,
    "log_level": "error",
    "seed": 3,
    "method": "ether",
    "n_blocks": 8,
    "initial_length": 0.5,
    "two_sided": False,
    "targets": ["attn2.to_k", "mid_block.*"],
    "rank": 5,
    "train_text_encoder": True,
    "resolution": 256,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_train_steps": 7,
    "learning_rate": 1e-4,
    "text_encoder_lr": 1e-5,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 4,
    "lr_num_cycles": 2,
    "lr_power": 2.5,
    "lr_step_rules": "1:3,0.1",
    "optimizer": "adamw8bit",
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_weight_decay": 0.01,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "ema_decay": 0.99,
    "mixed_precision": "no",
    "base_config": "tiny",
    "base_quantization": "nf4",
    "training_adapter": "other/ether_weights.safetensors",
    "gradient_checkpointing": True,
    "allow_tf32": True,
    "torch_compile": True,
    "snr_gamma": 5.0,
    "weighting_scheme": "mode",
    "logit_mean": 0.5,
    "logit_std": 0.8,
    "mode_scale": 0.7,
    "guidance_scale_training": 1.0,
    "max_sequence_length": 128,
    "prompt_chunks": 3,
    "noise_offset": 0.1,
    "checkpointing_steps": 20,
    "checkpoints_total_limit": 2,
    "validation_prompt": ["a dog: on [grass]", "null"],
    "num_validation_images": 2,
    "validation_steps": 30,
    "validation_seed": 9,
    "num_inference_steps": 10,
    "guidance_scale": 5.5,
    "sampler": "base",
    "dataloader_num_workers": 1,
    "cache_dir": "cache",
    "report_to": ["tensorboard"],
    "push_to_hub": True,
    "hub_private": True,
    "hub_model_id": "me/dog",
    "instance_data_dir": "cat",
    "instance_prompt": "a photo: of {qwe} cat",
    "nested_folders": True,
    "caption_column": "no",
    "caption_prefix": "a photo: of [qwe],",
    "shuffle_tags": True,
    "keep_tags": 2,
    "tag_orders": 5,
    "with_prior_preservation": True,
    "class_data_dir": "cats",
    "class_prompt": "yes",
    "num_class_images": 11,
    "prior_loss_weight": 0.5,
    "sample_batch_size": 6,
    "center_crop": True,
    "random_flip": True,
    "aspect_ratio_buckets": True,
    "placeholder_token": "<cat>",
    "initializer_token": "yes",
    "num_vectors": 2,
    "token_lr": 2e-4,
    "token_steps": 5,
    "validation_data_dir": "held_out",
    "dino": "judges/dino",
    "clip": "anytorch:ViT-L/14",
    "early_stopping": 3,
}
"""A value other than the default for every setting."""


def complaint(*arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_config(DreamBoothConfig, arguments)
    assert isinstance(ended.value.code, str)
    assert "\n" not in ended.value.code
    return ended.value.code


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], str]:
    """The flag for a YAML file with this text."""

    def write(text: str) -> str:
        (tmp_path / "config.yaml").write_text(text)
        return f"--config={tmp_path / 'config.yaml'}"

    return write


APART: dict[str, Any] = {"subjects_dir": None, "export_lora": None, "peft_config": None}
"""What does not go together with the others."""


def test_several_subjects_are_a_setting_as_well() -> None:
    needed = {"pretrained_model_name_or_path": "base", "output_dir": "runs", "subjects_dir": "photos"}
    config = parse_config(DreamBoothConfig, [f"--{name}={value}" for name, value in needed.items()])
    assert config.to_dict()["subjects_dir"] == "photos"


def test_the_lora_beside_the_result_is_a_setting_as_well() -> None:
    needed = {"pretrained_model_name_or_path": "base", "output_dir": "runs", "instance_data_dir": "photos"}
    needed |= {"instance_prompt": "a dog", "export_lora": "kohya"}
    config = parse_config(DreamBoothConfig, [f"--{name}={value}" for name, value in needed.items()])
    assert config.to_dict()["export_lora"] == "kohya"


def test_every_setting_is_tried_here() -> None:
    names, tried = {field.name for field in dataclasses.fields(DreamBoothConfig)}, {*OTHER, *APART}
    assert sorted(names - tried) == [], "give each a value in OTHER, or name it in APART"
    assert sorted(tried - names) == [], "there are no such settings any more"
    default = DreamBoothConfig(**NEEDED).to_dict()
    assert [name for name, value in OTHER.items() if default[name] == value] == []


def test_every_setting_is_a_flag() -> None:
    flags = [f"--{name}={value}" for name, value in OTHER.items()]
    assert parse_config(DreamBoothConfig, flags).to_dict() == OTHER | APART


def test_every_setting_is_a_key_of_the_file(written: Callable[[str], str]) -> None:
    assert parse_config(DreamBoothConfig, [written(yaml.safe_dump(OTHER))]).to_dict() == OTHER | APART


def test_what_is_not_given_has_its_default() -> None:
    assert parse_config(DreamBoothConfig, GIVEN) == DreamBoothConfig(**NEEDED)


@pytest.mark.parametrize("flag_first", [True, False])
def test_a_flag_wins_over_the_file_wherever_it_stands(flag_first: bool, written: Callable[[str], str]) -> None:
    file = written("seed: 4\nmax_train_steps: 9")
    config = parse_config(DreamBoothConfig, [*GIVEN, *(["--seed=5", file] if flag_first else [file, "--seed=5"])])
    assert config.max_train_steps == 9
    assert config.seed == 5


@pytest.mark.parametrize(
    ("arguments", "flip", "seed"),
    [
        (["--random_flip"], True, 0),
        (["--random_flip", "--seed", "3"], True, 3),
        (["--seed", "3", "--random_flip"], True, 3),
        (["--random_flip", "false"], False, 0),
        (["--random_flip=true"], True, 0),
    ],
)
def test_a_switch_may_stand_alone(arguments: list[str], flip: bool, seed: int) -> None:
    config = parse_config(DreamBoothConfig, [*GIVEN, *arguments])
    assert (config.random_flip, config.seed) == (flip, seed)


def test_lists_are_given_whole_or_one_by_one() -> None:
    whole = parse_config(DreamBoothConfig, [*GIVEN, '--validation_prompt=["a dog", "a cat"]'])
    singly = parse_config(DreamBoothConfig, [*GIVEN, "--validation_prompt+=a dog", "--validation_prompt+=a cat"])
    again = parse_config(DreamBoothConfig, [*GIVEN, "--validation_prompt", "a dog", "--validation_prompt", "a cat"])
    joined = parse_config(DreamBoothConfig, [*GIVEN, "--validation_prompt=a dog", "--validation_prompt=a cat"])
    one = parse_config(DreamBoothConfig, [*GIVEN, "--validation_prompt", "a dog"])
    for config in (whole, singly, again, joined):
        assert config.validation_prompt == ["a dog", "a cat"]
    assert one.validation_prompt == ["a dog"]


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--learning_rte=1", "learning_rate"),
        ("--learning-rate=1", "learning_rate"),
        ("--learning_rat=1", "learning_rate"),
        ("--with_prior_preservations", "with_prior_preservation"),
        ("--instance_dir=x", "instance_data_dir"),
    ],
)
def test_a_misspelt_flag_is_an_error_that_offers_the_nearest(flag: str, nearest: str) -> None:
    """Also where it is the beginning of one: an abbreviation is a typo that happens to work."""
    assert f'did you mean "{nearest}"?' in complaint(*GIVEN, flag)


def test_a_misspelt_key_of_the_file_is_an_error_that_offers_the_nearest(written: Callable[[str], str]) -> None:
    said = complaint(*GIVEN, written("leraning_rate: 1e-4"))
    assert "'leraning_rate' is not accepted" in said
    assert 'did you mean "learning_rate"?' in said


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("method", "ether_pls", "ether_plus"),
        ("lr_scheduler", "cosin", "cosine"),
        ("optimizer", "adamw8bits", "adamw8bit"),
        ("mixed_precision", "bf32", "bf16"),
        ("report_to", "tensorbord", "tensorboard"),
    ],
)
def test_an_unknown_choice_offers_the_nearest(
    name: str, value: str, nearest: str, written: Callable[[str], str]
) -> None:
    for said in (complaint(*GIVEN, f"--{name}={value}"), complaint(*GIVEN, written(f"{name}: {value}"))):
        assert f'"{name}"' in said
        assert value in said
        assert f'did you mean "{nearest}"?' in said


def test_an_unquoted_no_in_the_file_is_explained(written: Callable[[str], str]) -> None:
    assert complaint(*GIVEN, written("mixed_precision: no")).endswith(
        'did you mean "no"? YAML reads it as false without the quotes'
    )
    assert parse_config(DreamBoothConfig, [*GIVEN, written('mixed_precision: "no"')]).mixed_precision == "no"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seed=abc"], "seed is abc, a whole number is expected"),
        (["--seed=1.5"], "seed is 1.5, a whole number is expected"),
        (["--random_flip=maybe"], "random_flip is maybe, true or false is expected"),
        (["--max_train_steps=0"], "max_train_steps must be at least 1, not 0"),
        (["--lr_scheduler=piecewise_constant"], 'needs lr_step_rules, such as "1:600,0.1:900,0.01"'),
        (["--optimizer=prodigy", "--text_encoder_lr=0.1"], "one learning rate for all: leave out text_encoder_lr"),
        (["--with_prior_preservation"], 'with_prior_preservation needs class_prompt, such as "a photo of a dog"'),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_wrong_value_is_named(arguments: list[str], said: str) -> None:
    assert said in complaint(*GIVEN, *arguments)


@pytest.mark.parametrize("missing", NEEDED)
def test_a_missing_setting_is_named(missing: str) -> None:
    assert missing in complaint(*[flag for flag in GIVEN if not flag.startswith(f"--{missing}=")])


def test_a_file_that_is_no_yaml_is_refused(written: Callable[[str], str]) -> None:
    assert "config.yaml is no YAML that can be read" in complaint(*GIVEN, written("{seed"))


def test_values_of_a_recipe_for_another_base_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--config", "dreambooth_sd15", "--instance_data_dir", "dog", "--instance_prompt", "a dog"]
    flags += ["--class_prompt", "a dog", "--output_dir", "run"]
    parse_config(DreamBoothConfig, flags)
    assert not caplog.records
    parse_config(DreamBoothConfig, [*flags, "--pretrained_model_name_or_path", "playground"])
    [record] = caplog.records
    said = record.getMessage()
    assert said.startswith("the recipe is for stable-diffusion-v1-5/stable-diffusion-v1-5, the base is playground;")
    assert "kept: resolution=512, num_inference_steps=25, guidance_scale=7.5, sampler=DPMSolver" in said
    assert "prompt" not in said  # those are given
    caplog.clear()
    (tmp_path / "own.yaml").write_text("pretrained_model_name_or_path: a/b\nrevision: v1\ninstance_prompt: a qwe dog\n")
    own = ["--config", str(tmp_path / "own.yaml"), "--pretrained_model_name_or_path=c/d", "--instance_data_dir=dog"]
    own += ["--output_dir=run"]
    parse_config(DreamBoothConfig, own)
    assert "kept: revision=v1, instance_prompt=a qwe dog;" in caplog.text
    caplog.clear()
    parse_config(DreamBoothConfig, [*own, "--revision=v2", "--instance_prompt=a dog"])
    assert not caplog.records


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "abc"], "learning_rate is abc, a number is expected"),
        (["--max_train_steps", "1.5"], "max_train_steps is 1.5, a whole number is expected"),
        (["--method", "ether+"], 'did you mean "ether_plus"?'),
        (["--method", "ETHER"], 'did you mean "ether"?'),
    ],
)
def test_a_value_of_another_kind_is_named_in_words(flags: list[str], message: str) -> None:
    said = complaint(*GIVEN, *flags)
    assert said.endswith(message)
    assert "class '" not in said


def test_an_endless_value_is_cut_in_the_message() -> None:
    assert len(complaint(*GIVEN, "--max_train_steps", "x" * 100_000)) < 3000
