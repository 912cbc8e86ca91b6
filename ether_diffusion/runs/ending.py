"""What a training says at its end: what was made, its scores, how to load it, where the report is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.page.text import data_size, duration, number
from ether_diffusion.runs.model_card import loading_code
from ether_diffusion.runs.record import Run, read_run

DTYPES = {"bf16": "torch.bfloat16"}
"""Of a pipeline on a GPU, by ``mixed_precision``; autoencoders overflow in fp16, which is therefore left out."""
DRAWING = ("image = ", "with ether.controlled(")
"""How the line begins that draws."""
PICTURE = "picture.png"


def ending(folders: Sequence[Path]) -> str:
    """The end of a training in words, with Python lines that load its first result and draw with it.

    Args:
        folders: the run folders, one for each adapter that was trained together.

    Raises:
        FileNotFoundError: one is no run folder.
    """
    runs = [read_run(folder) for folder in folders]
    first = runs[0]
    lines = [f"{first.method_name} finished: {first.steps} in {duration(first.provenance.seconds)}"]
    for folder, run in zip(folders, runs, strict=True):
        lines += [
            f"weights and samples: {folder}, {data_size(run.result_bytes)} of weights",
            *_scores(run),
            f"report: {folder / 'report.html'}",
        ]
    return "\n".join([*lines, "", "Python that loads it and draws:", "", runnable(first), ""])


def runnable(run: Run) -> str:
    """Python lines that load a run on this machine, draw, and save the picture in the current folder."""
    lines = loading_code(run, here=True).splitlines()
    drawing = next(number for number, line in enumerate(lines) if line.startswith(DRAWING))
    if run.provenance.device.startswith("cuda"):
        dtype = DTYPES.get(str(run.config.get("mixed_precision")))
        lines.insert(drawing, f'pipe.to("cuda"{f", {dtype}" if dtype else ""})')
        lines = ["import torch", *lines] if dtype else lines
    return "\n".join([*lines, f'image.save("{PICTURE}")'])


def _scores(run: Run) -> list[str]:
    """The scores of the last scored samples beside the base's, and the best step, where samples were scored."""
    rows = {row["step"]: row for row in run.sample_scores}
    if not (steps := [step for step in rows if step]):
        return []
    last, base = rows[max(steps)], rows.get(0)
    dino = _beside(last["dino"], None if base is None else base["dino"])
    clip_t = _beside(last["clip_t"], None if base is None else base["clip_t"])
    best = "" if run.best_step is None else f"; the best step is {run.best_step}"
    return [f"scores of step {last['step']}: DINO {dino}, CLIP-T {clip_t}{best}"]


def _beside(score: float, base: float | None) -> str:
    return f"{number(score)}" if base is None else f"{number(score)} (base {number(base)})"
