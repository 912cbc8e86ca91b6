"""The settings: defaults of the paper, a hash of what a result depends on, and a file that can be used again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training.helpers import same_tensors, trained

from ether_diffusion.config import EtherConfig
from ether_diffusion.runs.folder import write_config
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.dreambooth import main
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.setup import make_accelerator


def config(**changes: Any) -> DreamBoothConfig:
    needed = {"pretrained_model_name_or_path": "base", "output_dir": Path("run"), "instance_data_dir": Path("dog")}
    return DreamBoothConfig(**{**needed, "instance_prompt": "a dog", **changes})


def test_the_defaults_are_those_of_the_paper() -> None:
    """ETHER, App. C.1: learning rate 6e-3, batch 1, 1200 steps; no decay, for the vectors are normalised."""
    default = config()
    assert default.ether_config() == EtherConfig("ether_plus", 4, True, "attention", 0)
    assert default.resolved_learning_rate == 6e-3
    assert (default.train_batch_size, default.max_train_steps, default.adam_weight_decay) == (1, 1200, 0.0)
    assert default.prior_loss_weight == 1.0


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"method": "ether"}, 6e-3),
        ({"method": "oft"}, 6e-5),
        ({"method": "lora"}, 6e-4),
        ({"method": "full"}, 5e-6),
        ({"optimizer": "prodigy"}, 1.0),
        ({"optimizer": "prodigy", "learning_rate": 0.5}, 0.5),
        ({"learning_rate": 1e-4}, 1e-4),
    ],
)
def test_every_method_has_its_learning_rate(changes: dict[str, Any], rate: float) -> None:
    assert config(**changes).resolved_learning_rate == rate


@pytest.mark.parametrize(
    ("changes", "guessed"),
    [
        ({"method": "hra"}, True),
        ({"method": "boft"}, True),
        ({"method": "hra", "learning_rate": 1e-3}, False),
        ({"method": "boft", "optimizer": "prodigy"}, False),
        ({"method": "oft"}, False),
    ],
)
def test_a_default_rate_that_nobody_has_tried_says_so_at_the_start(
    changes: dict[str, Any], guessed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(output_dir=tmp_path, **changes)
    assert settings.guessed_rate == guessed
    make_accelerator(settings)
    assert ("is a guess" in caplog.text) == guessed


def test_settings_that_0_1_had_have_the_hash_of_0_1(tmp_path: Path) -> None:
    """Computed by version 0.1; a setting that it did not have and that is not in ``LATER`` changes them."""
    needed: dict[str, Any] = {"pretrained_model_name_or_path": "base", "output_dir": tmp_path}
    needed |= {"num_inference_steps": 25, "guidance_scale": 7.5, "sampler": "DPMSolverMultistepScheduler"}
    subject = DreamBoothConfig(**needed, instance_data_dir=Path("dog"), instance_prompt="a dog")
    assert subject.hash() == "bfa19f1e4fcb", "add the new setting to DreamBoothConfig.LATER or TrainingConfig.LATER"
    control = ControlConfig(**needed, train_data_dir="pairs", targets="attention+geglu")
    assert control.hash() == "b124f02da3c5", "add the new setting to ControlConfig.LATER or TrainingConfig.LATER"


@pytest.mark.parametrize("changes", [{"seed": 1}, {"learning_rate": 1e-3}, {"instance_prompt": "a cat"}])
def test_the_hash_changes_with_what_the_result_depends_on(changes: dict[str, Any]) -> None:
    assert config(**changes).hash() != config().hash()


@pytest.mark.parametrize(
    "changes", [{"output_dir": Path("elsewhere")}, {"resume": "latest"}, {"report_to": ["wandb"]}, {"overwrite": True}]
)
def test_the_hash_does_not_change_with_where_the_result_is_kept(changes: dict[str, Any]) -> None:
    assert config(**changes).hash() == config().hash()


def test_config_yaml_read_back_gives_the_same_settings(tmp_path: Path) -> None:
    original = config(
        output_dir=tmp_path,
        targets=["attn2.*"],
        validation_prompt='a "dog": [qwe]',
        cache_dir=Path("cache"),
        mixed_precision="no",
        learning_rate=1e-5,
    )
    write_config(original.run)
    assert parse_config(DreamBoothConfig, ["--config", str(tmp_path / "config.yaml")]) == original


def test_the_config_of_a_run_repeats_it(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    main(flags(tmp_path / "first", max_train_steps=2, resolution=16))
    first = tmp_path / "first" / "config.yaml"
    main(["--config", str(first), "--output_dir", str(tmp_path / "second")])
    second = tmp_path / "second" / "config.yaml"
    resolved = {"learning_rate": 6e-3, "mixed_precision": "no", "resolution": 16}
    assert yaml.safe_load(first.read_text()).items() >= resolved.items()
    changed = {"output_dir": str(tmp_path / "second")}
    assert yaml.safe_load(second.read_text()) == yaml.safe_load(first.read_text()) | changed
    assert same_tensors(trained(tmp_path / "first", 2), trained(tmp_path / "second", 2))


def test_the_settings_of_dreambooth_are_where_0_1_had_them() -> None:
    from ether_diffusion.training import config

    assert config.DreamBoothConfig is DreamBoothConfig
    with pytest.raises(AttributeError, match="has no attribute 'ControlConfig'"):
        _ = config.ControlConfig
