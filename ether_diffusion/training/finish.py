"""The end of a run: weights, model card, report, upload."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import yaml
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from huggingface_hub import create_repo, upload_folder

from ether_diffusion.pipelines.file import FILE_NAME, first_line
from ether_diffusion.runs.folder import public_settings
from ether_diffusion.runs.model_card import write_model_card
from ether_diffusion.runs.record import read_run
from ether_diffusion.runs.report import write_report
from ether_diffusion.training.loop import Lane
from ether_diffusion.training.lora_export import export_trained, remove_older
from ether_diffusion.training.sections import HubSection
from ether_diffusion.training.trainables import save_trained

logger = logging.getLogger(__name__)

NOT_UPLOADED = [
    *("checkpoints/*", "cache/*", "class_images/*", "ether-diffusion/*", "wandb/*", ".*"),
    *("report.html", "provenance.json"),  # they hold the photos and the paths of this machine
    "config.yaml",  # it names folders of this machine, too; a copy without them is uploaded
]


def _not_uploaded(hub: HubSection) -> list[str]:
    """What stays here: what others need not see, and conditions that come from the training pairs."""
    return [*NOT_UPLOADED, *(["samples/conditions/*"] if hub.private_conditions else [])]


def finish(pipe: DiffusionPipeline, lanes: list[Lane], accelerator: Accelerator) -> Path:
    """Write every lane's weights, model card and report, upload them if asked to; return the first report's path."""
    if accelerator.is_main_process:
        for lane in lanes:
            save_trained(pipe, lane.trainables, lane.saving)
            remove_older(lane.saving)
            lane.provenance.update(status="finished", files=_files(lane))
            write_model_card(lane.saving.output_dir)
            write_report(lane.saving.output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:  # what may take minutes, while no other process waits
        for lane in lanes:
            export_trained(pipe, lane.trainables, lane.saving)
            if lane.saving.export_lora is not None:  # they name the file
                write_model_card(lane.saving.output_dir)
                write_report(lane.saving.output_dir)
            if lane.hub.push_to_hub:
                _push(lane.hub)
    return lanes[0].saving.output_dir / "report.html"


def _files(lane: Lane) -> dict[str, int]:
    """The adapter files of the run, each with the step of its weights: the last one, and the best where it is known."""
    content, own = lane.provenance.content, lane.saving.output_dir / FILE_NAME
    last = {FILE_NAME: content["step"]} if "step" in content and own.is_file() else {}
    return last | content.get("files", {})


def _push(hub: HubSection) -> None:
    """Upload the run folder; a failure costs the upload, not the run."""
    name = hub.hub_model_id or hub.output_dir.resolve().name
    try:
        repository = create_repo(name, private=hub.hub_private, exist_ok=True).repo_id
        upload_folder(
            repo_id=repository,
            folder_path=hub.output_dir,
            commit_message="Add ETHER weights",
            ignore_patterns=_not_uploaded(hub),
        )
        with tempfile.TemporaryDirectory() as place:
            settings = public_settings(read_run(hub.output_dir).config)
            (Path(place) / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
            upload_folder(repo_id=repository, folder_path=place, commit_message="Add settings")
        logger.info("uploaded to %s", repository)
    except Exception as error:  # noqa: BLE001 - whatever it is, the run is done and kept
        logger.error(
            "not uploaded to %s: %s. The run is complete in %s; log in with `hf auth login` and upload it with "
            "`hf upload %s %s %s`",
            name,
            first_line(error),
            hub.output_dir,
            name,
            hub.output_dir,
            " ".join(f"--exclude '{pattern}'" for pattern in _not_uploaded(hub)),
        )
