"""The ways in which two adapters of one base can act together, or one of them alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from diffusers import DiffusionPipeline

from ether_diffusion import pipelines
from ether_diffusion.families.registry import family_of
from ether_diffusion.logs import errors_only
from ether_diffusion.registry import MethodEntry
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.drawing import load_pipeline

FIRST, SECOND, SUM, WEAKER, PRODUCT = "first alone", "second alone", "sum", "sum at 0.7", "product"
STRENGTHS: Mapping[str, tuple[float, float]] = {
    FIRST: (1.0, 0.0),
    SECOND: (0.0, 1.0),
    SUM: (1.0, 1.0),
    WEAKER: (0.7, 0.7),
}
"""W + a ΔA + b ΔB: a and b of each way that adds."""
NAMES = ("first", "second")


def ways_of(entry: MethodEntry) -> list[str]:
    """The ways that a method has: only transforms can be multiplied.

    Raises:
        ValueError: its results cannot be added.
    """
    if not entry.has_strength:
        raise ValueError(f"adapters of method={entry.name} cannot be added here: take ether, ether_plus, naive or lora")
    return [*STRENGTHS, *([PRODUCT] if entry.is_own else [])]


def pipelines_of(
    entry: MethodEntry, base: Base, runs: tuple[Path, Path], device: str
) -> Iterator[tuple[str, DiffusionPipeline]]:
    """Each way with a pipeline that draws so, until the next one is asked for.

    Args:
        entry: the method of both runs.
        base: of both.
        runs: folders of the first and of the second.
        device: where to draw.

    Raises:
        ValueError: results of the method cannot be added.
    """
    ways = ways_of(entry)
    pipe = load_pipeline(base, device)
    for name, run in zip(NAMES, runs, strict=True):
        if entry.is_own:
            pipelines.load(pipe, run, name=name)
        else:
            pipe.load_lora_weights(str(run), adapter_name=name)
    for way in ways:
        if way == PRODUCT:
            yield way, _multiplied(pipe, base, runs[1], device)
        elif entry.is_own:
            pipelines.set_adapters(pipe, NAMES, STRENGTHS[way])
            pipelines.fuse(pipe)  # to draw as fast as the base does
            yield way, pipe
            pipelines.unfuse(pipe)
        else:
            pipe.set_adapters(list(NAMES), list(STRENGTHS[way]))
            yield way, pipe


def _multiplied(pipe: DiffusionPipeline, base: Base, second: Path, device: str) -> DiffusionPipeline:
    """A pipeline whose weights the first adapter has transformed, and on these the second: T_B(T_A(W))."""
    pipelines.set_adapters(pipe, NAMES, STRENGTHS[FIRST])
    pipelines.fuse(pipe)
    over = load_pipeline(base, device)
    for name in family_of(pipe).components:
        getattr(over, name).load_state_dict(getattr(pipe, name).state_dict())
    pipelines.unfuse(pipe)
    with errors_only("ether_diffusion.pipelines"):  # which warn of another base: it is meant to be one
        pipelines.load(over, second, name=NAMES[1])
    pipelines.fuse(over)
    return over
