"""What the tests of the examples of language share."""

from __future__ import annotations

import json
from pathlib import Path


def losses(folder: Path) -> list[float]:
    """The losses that a run has logged, the first one first."""
    log = json.loads((folder / "results.json").read_text(encoding="utf-8"))["log"]
    return [entry["loss"] for entry in log if "loss" in entry]
