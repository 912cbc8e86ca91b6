"""What can be trained in so much memory, by the computed figures of eight bases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.reading import read_json

COMPUTED = Path(__file__).with_name("memory.json")
"""Bytes of a training step by base, in bf16 with a batch of one and ETHER+ on all attention: benchmarks/memory.py."""
RESOLUTIONS = (512, 1024)
RESERVE = 2**30
"""Bytes that are left to the device's own libraries and to the pictures that are drawn."""
NF4, CHECKPOINTING = "--base_quantization nf4", "--gradient_checkpointing"


@dataclass(frozen=True)
class Fit:
    """Whether a base can be trained at a resolution.

    Attributes:
        base: its name.
        resolution: in pixels.
        flags: the fewest settings beside the precision that are enough; of one that does not fit those that need least.
        needs: bytes with these settings, computed.
        fits: whether that is there.
    """

    base: str
    resolution: int
    flags: tuple[str, ...]
    needs: int
    fits: bool


def computed() -> dict[str, Any]:
    """By base its bytes: ``base`` by precision, ``trained``, ``activations`` by resolution and checkpointing."""
    found: dict[str, Any] = read_json(COMPUTED, dict[str, object])
    return found


def fits(memory: int, half: bool) -> list[Fit]:
    """Every base at every resolution.

    Args:
        memory: bytes of the device.
        half: whether bf16 is taken; in fp32 weights and activations are twice as large, but for those in nf4.
    """
    return [
        _fit(base, resolution, figures, memory, half)
        for base, figures in computed().items()
        for resolution in RESOLUTIONS
    ]


def _fit(base: str, resolution: int, figures: dict[str, Any], memory: int, half: bool) -> Fit:
    for flags, needs in _ways(resolution, figures, half):
        if needs <= memory:
            return Fit(base, resolution, flags, needs, True)
    return Fit(base, resolution, flags, needs, False)


def _ways(resolution: int, figures: dict[str, Any], half: bool) -> Iterator[tuple[tuple[str, ...], int]]:
    """Settings from the fastest to the smallest, each with the bytes that it needs."""
    wide = 1 if half else 2
    plain, few = figures["base"]["bf16"] * wide, figures["base"]["nf4"]
    kept, again = (figures["activations"][f"{resolution}{how}"] * wide for how in ("", " checkpointed"))
    trained = figures["trained"] + RESERVE
    yield (), plain + kept + trained
    yield (CHECKPOINTING,), plain + again + trained
    yield (CHECKPOINTING, NF4), few + again + trained
