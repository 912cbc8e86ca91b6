"""What can be trained in so much memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ether_diffusion.doctor.capacity import CHECKPOINTING, NF4, RESERVE, RESOLUTIONS, Fit, computed, fits

GIBIBYTE = 2**30
TABLE = Path(__file__).parents[2] / "docs" / "families.md"


def fit(base: str, resolution: int, memory: int, half: bool = True) -> Fit:
    (found,) = (each for each in fits(memory, half) if (each.base, each.resolution) == (base, resolution))
    return found


def test_the_least_that_a_base_needs_is_the_table_of_families_and_the_reserve() -> None:
    rows = re.findall(r"^\| (.+?) \|.* (\d+\.\d\d) \|$", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    least = {base: float(size) for base, size in rows if base in computed()}
    assert least.keys() == computed().keys()
    for base, size in least.items():
        found = fit(base, 1024, 0)
        assert (found.flags, found.fits) == ((CHECKPOINTING, NF4), False)
        assert (found.needs - RESERVE) / GIBIBYTE == pytest.approx(size, abs=0.005)


@pytest.mark.parametrize("base", computed())
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_settings_are_taken_only_where_without_them_it_does_not_fit(base: str, resolution: int) -> None:
    plenty = fit(base, resolution, 1000 * GIBIBYTE)
    assert (plenty.flags, plenty.fits) == ((), True)
    assert fit(base, resolution, plenty.needs) == plenty
    less = fit(base, resolution, plenty.needs - 1)
    assert (less.flags, less.fits) == ((CHECKPOINTING,), True)
    least = fit(base, resolution, less.needs - 1)
    assert (least.flags, least.fits) == ((CHECKPOINTING, NF4), True)
    assert fit(base, resolution, least.needs - 1).fits is False


def test_in_fp32_all_that_bf16_halves_is_twice_as_large() -> None:
    figures = computed()["SD1.5"]
    half, whole = (fit("SD1.5", 512, 1000 * GIBIBYTE, half).needs for half in (True, False))
    assert whole - half == figures["base"]["bf16"] + figures["activations"]["512"]
