"""The help of the programs: groups, the common settings or all, and what each setting says of itself."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from ether_diffusion.ranges import COUNT, Range
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.groups import UNITS, Group
from ether_diffusion.training.help import help_of

BOTH = pytest.mark.parametrize("config_class", [DreamBoothConfig, ControlConfig])


def shown(config_class: type[Any], flag: str, capsys: pytest.CaptureFixture[str], columns: int = 400) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as ended:
            parse_config(config_class, [flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


def flags_of(text: str) -> list[str]:
    """The settings that a help lists, in its order."""
    return re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)


def names(config_class: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


@BOTH
def test_every_setting_is_in_one_group(config_class: type[Any]) -> None:
    grouped = [name for group in config_class.GROUPS.values() for name in group]
    assert sorted(grouped) == sorted(names(config_class))


def test_every_unit_is_of_a_number() -> None:
    ranges = DreamBoothConfig.RANGES | ControlConfig.RANGES
    assert set(UNITS) <= set(ranges)


@BOTH
def test_all_settings_are_shown_on_demand(config_class: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(config_class, "--help=all", capsys)
    assert set(flags_of(text)) - {"config", "print_config"} == set(names(config_class))
    assert "more settings" not in text
    headings = re.findall(r"^(\w[\w, ]*):$", text, flags=re.MULTILINE)
    assert headings[:4] == ["command", "required, here or in the recipe", "data", "model"]


@BOTH
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_short_help_has_the_common_ones_the_required_first(
    config_class: type[Any], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(config_class, flag, capsys)
    common = [name for group in config_class.GROUPS.values() for name in group.common]
    assert flags_of(text) == ["config", *common]
    assert flags_of(text)[1:3] == ["pretrained_model_name_or_path", "output_dir"]
    assert f"{len(names(config_class)) - len(common)} more settings: --help=all" in text
    assert len(common) <= 35


def test_a_setting_says_its_unit_range_default_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown(DreamBoothConfig, "--help=all", capsys).split())
    assert "--max_train_steps STEPS optimisation steps (at least 1; default: 1200)" in text
    assert "--random_flip [true|false] mirror every other photo" in text
    assert "prodigy prodigyopt (then learning_rate is a factor near 1) (default: adamw)" in text
    assert "one of constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial" in text
    assert "--adam_beta2 NUMBER second moment's decay (at least 0 and below 1; default: 0.999)" in text
    assert "--output_dir PATH the run folder (required)" in text


@BOTH
def test_every_default_is_shown(config_class: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(config_class, "--help=all", capsys, columns=10_000)
    lines = {found[1]: found[2] for found in re.finditer(r"^  --(\w+)(.*(?:\n {30}.*)*)", text, flags=re.MULTILINE)}
    for field in dataclasses.fields(config_class):
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"default: {field.default}" in lines[field.name]


def test_it_fits_a_terminal_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert max(map(len, shown(DreamBoothConfig, "--help=all", capsys, columns=80).splitlines())) <= 80


def test_another_value_of_help_is_refused() -> None:
    with pytest.raises(SystemExit, match="--help=al shows nothing: --help shows the common settings, --help=all all"):
        parse_config(DreamBoothConfig, ["--help=al"])


@dataclass
class _Plain:
    """A config without groups.

    Attributes:
        share: in % of all.
        kind: which one.
        folder: needed.
    """

    RANGES: ClassVar[dict[str, Range]] = {"share": COUNT}

    folder: str
    share: int = 3
    kind: Literal["alpha", "beta"] | None = None


def test_a_config_without_groups_is_shown_whole() -> None:
    text = " ".join(help_of(_Plain, "plain", everything=False).split())
    assert text.startswith("usage: plain [--config RECIPE] --SETTING VALUE … A config without groups. command:")
    assert "settings: --folder TEXT needed (required) --share INTEGER in % of all (at least 1; default: 3)" in text
    assert "--kind NAME which one; one of alpha, beta" in text
    assert "--help=all" not in text


def test_groups_join_in_order() -> None:
    assert tuple(Group(("a",), ("b",)) + Group(("c",), ("d",))) == ("a", "c", "b", "d")
