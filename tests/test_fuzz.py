"""Every reader reads a file or refuses it with its one error: inputs that once did harm, and changed ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from corpus import make
from fuzz import READERS, fault, fuzz, whole_record

BUDGET = 2.0
"""Seconds for each reader; ``python tests/fuzz.py`` takes as long as it needs."""
BROKEN = [(reader, name) for reader, files in make.broken().items() for name in files]


@pytest.mark.parametrize(("reader", "name"), BROKEN)
def test_inputs_that_once_did_harm_are_refused(tmp_path: Path, reader: str, name: str) -> None:
    if reader == "record":
        whole_record(tmp_path)
    path = tmp_path / (f"metadata{Path(name).suffix}" if reader in ("listing", "captions") else name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(make.broken()[reader][name])
    wrong, was_read = fault(READERS[reader], path)
    assert wrong is None
    assert was_read == (name == "metrics.jsonl")  # torn lines of a killed run are counted, not refused


@pytest.mark.parametrize("name", READERS)
def test_changed_files_are_read_or_refused_with_the_one_error(tmp_path: Path, name: str) -> None:
    tally = fuzz(name, range(100_000), 1, tmp_path, until=time.monotonic() + BUDGET)
    assert tally.faults == {}
    assert tally.files > 5
