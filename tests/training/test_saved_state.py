"""A saved state replaces one of its own kind only."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from ether_diffusion.training.saved_state import unlike

OWN: dict[str, Any] = {"step": 3, "lr": [0.1, 0.2], "m": torch.zeros(2, 3), "on": True, "growth": math.inf, "more": {}}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, None),
        ({"step": 9.5, "lr": (1, 2), "m": torch.ones(2, 3, dtype=torch.float64), "unknown": object()}, None),
        ({"m": None, "step": None}, None),
        ({"step": "3"}, "step is '3', a number is expected"),
        ({"step": True}, "step is True, a number is expected"),
        ({"step": math.nan}, "step is nan, a number is expected"),
        ({"step": 10**30}, "step is 1000"),
        ({"lr": [0.1, math.inf]}, "lr.1 is inf, a number is expected"),
        ({"lr": [0.1]}, "lr is a list, 2 values are expected"),
        ({"m": torch.zeros(3)}, r"m is \(3,\), a tensor of \(2, 3\) is expected"),
        ({"m": torch.full((2, 3), math.nan)}, "m has values that are not finite"),
        ({"m": [0, 0]}, "m is a list, a tensor of"),
        ({"on": 1}, "on is 1"),
        ({"more": 1}, "more is 1, no table"),
    ],
)
def test_what_is_of_another_kind_is_named(changes: dict[str, Any], wrong: str | None) -> None:
    found = unlike(OWN | changes, OWN)
    if wrong is None:
        assert found is None
    else:
        assert found is not None
        assert re.match(wrong, found)
