"""The exact LoRA beside a run's result: whether it can be written is known before the training."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from diffusers import DiffusionPipeline

from ether_diffusion.core.adapter import Adapter
from ether_diffusion.export.names import stem_of
from ether_diffusion.families.protocol import Family
from ether_diffusion.pipelines.schema import LORA_FILE
from ether_diffusion.runs.lora import export_beside
from ether_diffusion.training.sections import SavingSection
from ether_diffusion.training.trainables import Trainable

logger = logging.getLogger(__name__)


def check_export(family: Family, trainables: Sequence[Trainable], kind: str | None) -> None:
    """See that readers of the format have names for all that is trained.

    Raises:
        ExportError: the family has no such format, or its readers know no name for a layer.
        ImportError: peft is missing, with which diffusers reads the file back.
    """
    if kind is None:
        return
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("export_lora reads the file back, with peft: pip install 'ether-diffusion[study]'") from error
    for trainable in trainables:
        if isinstance(trainable.module, Adapter):
            for path in trainable.module.methods():
                stem_of(family, trainable.component, path, kind)


def remove_older(saving: SavingSection) -> None:
    """Remove the LoRA of an earlier part of the run, which is not what it has learnt now."""
    if saving.entry.is_own:
        (saving.output_dir / LORA_FILE).unlink(missing_ok=True)


def export_trained(pipe: DiffusionPipeline, trainables: Sequence[Trainable], saving: SavingSection) -> None:
    """Write the LoRA of a lane; what keeps it from being written costs the LoRA, not the run."""
    if saving.export_lora is None:
        return
    adapter = next(each.adapter for each in trainables if isinstance(each.module, Adapter))
    try:
        written = export_beside(pipe, saving.output_dir, adapter, saving.export_lora)
    except Exception as error:  # noqa: BLE001 - whatever it is, the run is done and kept
        logger.error(
            "%s was not written: %s. The run is complete; `ether export %s FILE` tries it again",
            saving.output_dir / LORA_FILE,
            error,
            saving.output_dir,
        )
    else:
        logger.info("%s", written)
