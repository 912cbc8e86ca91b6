"""What a training says before it begins: what is trained, on what, for how long, where the result will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ether_diffusion.data.control import ControlPairs
from ether_diffusion.data.subject import SubjectFolder
from ether_diffusion.page.text import data_size
from ether_diffusion.registry import title_of
from ether_diffusion.runs.record import format_value
from ether_diffusion.training.config import TrainingConfig
from ether_diffusion.training.loop import Lane
from ether_diffusion.training.memory import OPTIMIZER_STATES
from ether_diffusion.training.pace import FIRST
from ether_diffusion.training.program import Start
from ether_diffusion.training.sections import BatchSection
from ether_diffusion.training.trainables import Trainable

NAMED = 4
"""So many files are named."""


def summary(start: Start[Any], lanes: Sequence[Lane], pictures: str) -> str:
    """Nine lines.

    Args:
        start: of the run, with the settings that its base decided.
        lanes: its trainings.
        pictures: what they learn from, in words.
    """
    config, accelerator, family = start.config, start.accelerator, start.family
    trainables, name = lanes[0].trainables, config.pretrained_model_name_or_path
    several = f"{len(lanes)} adapters, each " if len(lanes) > 1 else ""
    values = {each: getattr(config, each) for each in config.entry.settings}
    own = [f"{each} {format_value(value)}" for each, value in values.items() if value is not None]
    own.append(f"learning rate {config.resolved_learning_rate:g}, {config.lr_scheduler}")
    rows = {
        "base": f"{name} ({family.TITLE})",
        "trained": several + _parameters(trainables),
        "settings": ", ".join(own),
        "pictures": pictures,
        "steps": _steps(start, lanes[0]),
        "samples": _samples(config, lanes),
        "device": f"{accelerator.device}{_processes(accelerator.num_processes)}, {_memory(start, lanes)}",
        "time": f"told after {FIRST} steps, with the memory in use",
        "result": str(config.output_dir),
    }
    width = max(map(len, rows)) + 2
    return "\n".join([f"training {title_of(config.to_dict())}", *(f"  {key:{width}}{rows[key]}" for key in rows)])


def pictures_of(subjects: Sequence[SubjectFolder], prior: SubjectFolder | None = None) -> str:
    """How many pictures there are, of which size, and which were enlarged or skipped.

    Args:
        subjects: the folder of each subject.
        prior: the pictures of the class, if the one subject has such.
    """
    total = sum(map(len, subjects))
    where = str(subjects[0].folder) if len(subjects) == 1 else f"{len(subjects)} folders"
    told = [f"{total} in {where}, {_sizes(size for each in subjects for size in each.sizes)}"]
    if prior is not None:
        told.append(f"{len(prior)} of the class")
    enlarged = [each.pictures[index].name for each in subjects for index in each.enlarged]
    skipped = [path.relative_to(each.folder).as_posix() for each in subjects for path in each.skipped]
    return "; ".join([*told, *_named("enlarged", enlarged), *_named("skipped", skipped)])


def pairs_of(pairs: ControlPairs) -> str:
    """How many pairs there are, and of which size."""
    count = "endless" if pairs.source.endless else f"{len(pairs.source):,}"
    return f"{count} pairs with their conditions, {_sizes([(pairs.resolution, pairs.resolution)])}"


def _sizes(sizes: Iterable[tuple[int, int]]) -> str:
    """(height, width) of the pictures as people write it, the most frequent of several first."""
    found = [f"{width} x {height}" for (height, width), _ in Counter(sizes).most_common()]
    more = f" and {len(found) - NAMED} more sizes" if len(found) > NAMED else ""
    return f"{', '.join(found[:NAMED])}{more} pixels"


def _named(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"{len(names)} {what} ({', '.join(names[:NAMED])}{more})"] if names else []


def _parameters(trainables: Sequence[Trainable]) -> str:
    total = sum(each.num_parameters() for each in trainables)
    return f"{total:,} parameters of {', '.join(each.component for each in trainables)}"


def _steps(start: Start[Any], lane: Lane) -> str:
    config = start.config
    size = config.section(BatchSection).batch_size(start.accelerator.num_processes)
    told = f"{config.max_train_steps:,} of {size} picture{'s' * (size > 1)}"
    if start.checkpoint is not None:
        told += f", going on from {start.checkpoint.name}"
    if lane.seen is not None:
        first = lane.seen.until(config.max_train_steps)[lane.seen.streams[0].name]
        few, most = first["fewest"], first["most"]
        told += f"; each picture is shown {most if few == most else f'{few} to {most}'} times"
    return told


def _samples(config: TrainingConfig, lanes: Sequence[Lane]) -> str:
    count = config.num_validation_images * sum(len(lane.shown) for lane in lanes)
    if not count:
        return f"none; a checkpoint every {config.checkpointing_steps} steps"
    return f"{count} every {config.validation_steps} steps; a checkpoint every {config.checkpointing_steps}"


def _processes(number: int) -> str:
    return f", {number} processes" if number > 1 else ""


def _memory(start: Start[Any], lanes: Sequence[Lane]) -> str:
    """What weights, gradients and optimiser take of the memory of a device; the activations are not known yet."""
    modules = [part for part in start.family.pipe.components.values() if isinstance(part, nn.Module)]
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in modules
        for tensor in module.parameters()
        if tensor.device == start.accelerator.device
    }
    trained = sum(each.num_parameters() for lane in lanes for each in lane.trainables)
    states = int((4 + OPTIMIZER_STATES[start.config.optimizer]) * trained)
    return (
        f"{data_size(sum(held.values()))} of weights, {data_size(states)} of gradients and optimiser, plus activations"
    )
