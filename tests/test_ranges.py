"""Every number among the settings has a range, which is checked at once and shown in the help."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import ether_diffusion
from ether_diffusion.evaluation.controls.settings import ControlStudyConfig
from ether_diffusion.evaluation.subjects.settings import BenchmarkConfig
from ether_diffusion.ranges import AMOUNT, COUNT, POSITIVE, SHARE, Range
from ether_diffusion.runs.control_drawing import Drawing
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

BASE: dict[str, Any] = {"pretrained_model_name_or_path": "base", "output_dir": "run"}
VALID: dict[Any, dict[str, Any]] = {
    DreamBoothConfig: {**BASE, "instance_data_dir": "photos", "instance_prompt": "a photo of q dog"},
    ControlConfig: {**BASE, "train_data_dir": "playground"},
    BenchmarkConfig: {"output_dir": "run", "training": {"pretrained_model_name_or_path": "base"}},
    ControlStudyConfig: {"output_dir": "run", "arms": {"a": {}}, "training": {"train_data_dir": "playground"}},
}
SETTINGS = pytest.mark.parametrize("settings", VALID, ids=lambda each: each.__name__)


@pytest.mark.parametrize("settings", [*VALID, Drawing], ids=lambda each: each.__name__)
def test_every_number_has_a_range(settings: Any) -> None:
    kinds = {field.name: str(field.type).replace(" | None", "") for field in dataclasses.fields(settings)}
    numbers = {name for name, kind in kinds.items() if kind in ("int", "float", "list[int]", "list[float]")}
    assert numbers == set(settings.RANGES)


@SETTINGS
def test_a_number_out_of_its_range_is_refused_by_name(settings: Any) -> None:
    settings(**VALID[settings])
    for name, allowed in settings.RANGES.items():
        wrong = [allowed.low if allowed.above else allowed.low - 1, float("nan"), float("inf"), 10**400, 10**5000]
        for value in wrong:
            given = [value] if isinstance(getattr(settings(**VALID[settings]), name), list) else value
            with pytest.raises(ValueError, match=rf"^{name} must be {re.escape(str(allowed))}, not"):
                settings(**VALID[settings] | {name: given})
        with pytest.raises(ValueError, match=rf"^{name} must be a number"):
            settings(**VALID[settings] | {name: "many"})


@pytest.mark.parametrize("settings", [DreamBoothConfig, ControlConfig])
def test_the_help_names_the_ranges(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(settings, ["--help=all"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, allowed in settings.RANGES.items():
        own = shown[shown.rindex(f"--{name} ") :][:600]
        assert str(allowed) in own, name


def test_a_run_needs_a_folder_of_its_own() -> None:
    for folder in ("", "."):
        with pytest.raises(ValueError, match="output_dir must name a folder of the run's own"):
            DreamBoothConfig(**VALID[DreamBoothConfig] | {"output_dir": folder})


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (COUNT, (1, 7), (0, -1)),
        (AMOUNT, (0, 0.5), (-1,)),
        (POSITIVE, (1e-9,), (0, -1)),
        (SHARE, (0, 1), (-0.1, 1.1)),
        (Range(0, 1, below=True), (0, 0.999), (1,)),
    ],
    ids=str,
)
def test_ranges(allowed: Range, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in (*outside, float("nan"), float("inf"), 2**63, 10**5000, -(10**5000)))


def test_flags_of_argparse_have_ranges_too(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=COUNT.of(int))
    assert parser.parse_args(["--count", "3"]).count == 3
    told = (
        ("0", "it must be at least 1, not 0"),
        ("x", "'x' is not a number"),
        (f"1{'0' * 400}", "not an enormous number, which is too large"),
    )
    for given, message in told:
        with pytest.raises(SystemExit):
            parser.parse_args(["--count", given])
        assert message in capsys.readouterr().err


def test_no_program_takes_a_number_without_a_range() -> None:
    found = []
    for path in Path(ether_diffusion.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "type" and isinstance(node.value, ast.Name):
                found += [f"{path.name}:{node.value.lineno}"] if node.value.id in ("int", "float") else []
    assert found == []
