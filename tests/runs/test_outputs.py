"""A run that could not write its result does not start."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.runs.written import RUN_FILES

Train = Callable[..., Path]

SHORT: dict[str, Any] = {"max_train_steps": 1, "resolution": 16}


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is not even loaded."""

    def load(*arguments: object) -> None:
        raise AssertionError("the run has started")

    monkeypatch.setattr("ether_diffusion.training.program.load_base", load)


@pytest.mark.parametrize("name", [*RUN_FILES, "samples", "checkpoints"])
def test_a_name_that_is_taken_is_refused(name: str, train: Train, tmp_path: Path) -> None:
    path = tmp_path / "run" / name
    if name in RUN_FILES:
        path.mkdir(parents=True)
    else:
        path.parent.mkdir()
        path.write_text("")
    with pytest.raises(OSError, match=f"{name}"):
        train(**SHORT)
    assert list((tmp_path / "run").rglob("*")) == [path]


@pytest.mark.skipif(os.name != "posix", reason="other systems have other limits")
def test_a_long_path_is_refused_when_only_the_short_names_fit(train: Train, tmp_path: Path) -> None:
    limit = os.pathconf(tmp_path, "PC_PATH_MAX")
    folder = tmp_path
    while len(str(folder)) < limit - 300:
        folder /= "x" * min(200, limit - 80 - len(str(folder)))
    folder /= "y" * (limit - 80 - len(str(folder)) - 2)
    with pytest.raises(OSError, match=r"cannot write .*: File name too long"):
        train(output_dir=folder, **SHORT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "hub_model_id"), [("my run", None), ("x" * 97, None), ("run", "a--b"), ("run", "é")])
def test_a_name_that_the_hub_refuses_is_told_first(
    name: str, hub_model_id: str | None, train: Train, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="the Hub takes no repository named"):
        train(name, push_to_hub=True, hub_model_id=hub_model_id, **SHORT)
    assert not (tmp_path / name).exists()


def test_what_is_no_text_is_refused(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no text"):
        train(os.fsdecode(b"run-\xff"), **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_good_place_is_left_as_it_is(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(AssertionError, match="the run has started"):
        train(push_to_hub=True, **SHORT)
    assert list((tmp_path / "run").iterdir()) == []
