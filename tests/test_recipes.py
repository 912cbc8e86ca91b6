"""Configs are found by path, as ever, and by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ether_diffusion.recipes import find_config, recipes
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

CONFIGS = Path(__file__).parents[1] / "configs"
NEEDED = ["--output_dir=run", "--instance_data_dir=dog", "--instance_prompt=a qwe dog", "--class_prompt=a dog"]


def parsed(arguments: Sequence[str]) -> DreamBoothConfig:
    return parse_config(DreamBoothConfig, arguments)


def test_every_file_of_the_folder_is_known_by_its_name() -> None:
    assert recipes() == {path.stem: path for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "dreambooth_sd15", *NEEDED, "--seed=4"],
        ["--seed=4", *NEEDED, "--config", "dreambooth_sd15"],
        [*NEEDED, "--config=dreambooth_sd15", "--seed", "4"],
    ],
)
def test_a_name_means_what_the_path_means_wherever_it_stands(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    by_path = parsed([f"--config={CONFIGS / 'dreambooth_sd15.yaml'}", *NEEDED, "--seed=4"])
    assert by_path.with_prior_preservation  # the file says so, the default does not
    assert parsed(arguments) == by_path


def test_two_configs_add_up_and_the_later_one_wins(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("max_train_steps: 7")
    both = parsed([*NEEDED, "--config", "demo", "--config", str(tmp_path / "more.yaml")])
    assert (both.max_train_steps, both.guidance_scale) == (7, 4)


def test_a_file_goes_over_a_recipe_and_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert find_config("demo") == CONFIGS / "demo.yaml"
    Path("demo").rmdir()
    Path("demo").write_text("seed: 3")
    assert find_config("demo") == Path("demo")


def test_settings_themselves_are_a_config_as_well() -> None:
    assert parsed(["--config=demo", *NEEDED, "--config", "{seed: 3, max_train_steps: 9}"]).seed == 3


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("dreambooth_sd51", "dreambooth_sd35"), ("configs/control_sd15.yaml", "controlnet_sd15"), ("demo.yaml", "demo")],
)
def test_an_unknown_config_is_an_error_that_offers_the_nearest(
    given: str, nearest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=rf'no config file {given}, did you mean "{nearest}"\?; known by name: '):
        parsed([f"--config={given}", *NEEDED])


def test_a_config_flag_without_its_value_is_named() -> None:
    with pytest.raises(SystemExit, match="--config: expected one argument"):
        parsed([*NEEDED, "--config"])
