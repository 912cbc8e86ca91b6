"""The exact LoRA beside a run's result, and what its header says of the run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ether_diffusion import export
from ether_diffusion.export.lora import Exported
from ether_diffusion.images import UnreadableImageError, load_image
from ether_diffusion.page.pictures import data_uri
from ether_diffusion.pipelines.schema import LORA_FILE
from ether_diffusion.runs.record import Run, read_run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

THUMBNAIL = 256
"""Pixels of its longer side."""


def export_beside(pipe: DiffusionPipeline, run_dir: str | Path, name: str, format: str) -> Exported:
    """Write the LoRA of what a run has just trained into its folder, in place of one that is there.

    Args:
        pipe: the pipeline that it was trained in, whose weights are what the adapter knows.
        run_dir: the run folder.
        name: of the adapter in the pipeline.
        format: one of the family's.

    Raises:
        ExportError: as :func:`export_lora`.
    """
    run = read_run(Path(run_dir))
    (run.folder / LORA_FILE).unlink(missing_ok=True)
    return export.lora.export_lora(pipe, run.folder / LORA_FILE, format, name, told=told_of(run), base=run.base)


def told_of(run: Run) -> dict[str, str]:
    """What the header says of a run: its title, the words that call what it learnt, and a picture drawn with it."""
    told = {"modelspec.title": run.folder.name}
    if run.instance_prompt:
        told["modelspec.trigger_phrase"] = run.instance_prompt
    if run.finetuned_step is not None and run.prompts:
        picture = run.folder / run.sample(run.finetuned_step, run.prompts[0]["file"])
        if picture.is_file():
            with suppress(UnreadableImageError):  # a broken picture costs itself
                told["modelspec.thumbnail"] = data_uri(load_image(picture), THUMBNAIL, kind="jpeg")
    return told
