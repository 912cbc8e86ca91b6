"""A benchmark on one picture to show around."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ether_diffusion.evaluation.subjects.found import read_benchmark
from ether_diffusion.evaluation.subjects.sections import picture_for, prompts_of
from ether_diffusion.evaluation.subjects.summary import Result
from ether_diffusion.images import load_image
from ether_diffusion.page.pictures import SIDE, picture_grid

BLANK = Image.new("RGB", (SIDE, SIDE), "white")
"""In the place of a picture that is not there."""


def draw_sheet(folder: Path, subjects: Sequence[str] = (), prompt: int = 0) -> Image.Image:
    """One picture of a benchmark: a row per subject, its reference, then every method at its best rate for one prompt.

    The place of a picture that is not there, as in an unfinished benchmark, stays empty.

    Args:
        folder: where ``eval/dreambench.py`` wrote.
        subjects: rows; all where none is named.
        prompt: the number of the subject's prompt that is shown, of its first image.

    Raises:
        FileNotFoundError: it is no benchmark's folder, or pictures are gone.
        ValueError: a subject is not in it, or has no such prompt or no pictures yet.
    """
    benchmark = read_benchmark(folder, folder.name)
    arms, rows = benchmark.shown_arms, []
    for subject in subjects or benchmark.subjects:
        if subject not in benchmark.subjects:
            raise ValueError(f"{folder} has no subject {subject!r}; it has {', '.join(benchmark.subjects)}")
        found = [_drawn(benchmark.results_of(row, subject)) for row in arms]
        known = next((result for result in found if result is not None), None)
        if known is None:
            raise ValueError(f"{folder} has no pictures of {subject} yet")
        prompts = prompts_of(known)
        if not 0 <= prompt < len(prompts):
            raise ValueError(f"{subject} has the prompts 0 to {len(prompts) - 1}, not {prompt}")
        files = [None if result is None else picture_for(benchmark, result, prompts[prompt]) for result in found]
        shown = [Path(known["references"][0]), *files]
        rows.append((prompts[prompt], [BLANK if path is None else load_image(path) for path in shown]))
    return picture_grid(rows, ["reference", *(str(row["arm"]) for row in arms)])


def _drawn(results: list[Result]) -> Result | None:
    """The first result with pictures; a training that diverged has none."""
    return next((result for result in results if result["images"]), None)
