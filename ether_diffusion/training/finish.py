"""The end of a run: weights, model card, report, upload."""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from huggingface_hub import create_repo, upload_folder

from ether_diffusion.pipelines.file import first_line
from ether_diffusion.playground import NAME as PLAYGROUND
from ether_diffusion.runs.model_card import write_model_card
from ether_diffusion.runs.report import write_report
from ether_diffusion.training.config import TrainingConfig
from ether_diffusion.training.loop import Lane
from ether_diffusion.training.trainables import save_trained

logger = logging.getLogger(__name__)

NOT_UPLOADED = [
    *("checkpoints/*", "cache/*", "class_images/*", "ether-diffusion/*", "wandb/*", ".*"),
    *("report.html", "provenance.json"),  # they hold the photos and the paths of this machine
]


def _not_uploaded(config: TrainingConfig) -> list[str]:
    """What stays here: what others need not see, and conditions that come from the training pairs."""
    pairs = getattr(config, "train_data_dir", None) != PLAYGROUND and not getattr(config, "validation_image", True)
    return [*NOT_UPLOADED, *(["samples/conditions/*"] if pairs else [])]


def finish(pipe: DiffusionPipeline, lanes: list[Lane], accelerator: Accelerator) -> Path:
    """Write every lane's weights, model card and report, upload them if asked to; return the first report's path."""
    if accelerator.is_main_process:
        for lane in lanes:
            save_trained(pipe, lane.trainables, lane.config)
            lane.provenance.update(status="finished")
            write_model_card(lane.config.output_dir)
            write_report(lane.config.output_dir)
            if lane.config.push_to_hub:
                _push(lane.config)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return lanes[0].config.output_dir / "report.html"


def _push(config: TrainingConfig) -> None:
    """Upload the run folder; a failure costs the upload, not the run."""
    name = config.hub_model_id or config.output_dir.resolve().name
    try:
        repository = create_repo(name, private=config.hub_private, exist_ok=True).repo_id
        upload_folder(
            repo_id=repository,
            folder_path=config.output_dir,
            commit_message="Add ETHER weights",
            ignore_patterns=_not_uploaded(config),
        )
        logger.info("uploaded to %s", repository)
    except Exception as error:  # noqa: BLE001 - whatever it is, the run is done and kept
        logger.error(
            "not uploaded to %s: %s. The run is complete in %s; log in with `hf auth login` and upload it with "
            "`hf upload %s %s %s`",
            name,
            first_line(error),
            config.output_dir,
            name,
            config.output_dir,
            " ".join(f"--exclude '{pattern}'" for pattern in _not_uploaded(config)),
        )
