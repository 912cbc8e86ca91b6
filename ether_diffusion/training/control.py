"""Controllable generation: from pairs of pictures and conditions to a model that follows the condition."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ether_diffusion.control.conditions import load_condition
from ether_diffusion.data.augment import Augmentation
from ether_diffusion.data.control import ControlPairs
from ether_diffusion.data.pairs import (
    Columns,
    DatasetPairs,
    EndlessPairs,
    FolderPairs,
    PairFiles,
    PairSource,
    plain_listing,
    read_listing,
)
from ether_diffusion.data.plan import BatchPlan, EndlessPlan
from ether_diffusion.data.randomness import generator
from ether_diffusion.families.protocol import Family, Objective
from ether_diffusion.families.settings import ObjectiveSettings
from ether_diffusion.playground import NAME as PLAYGROUND
from ether_diffusion.playground.pairs import HELD_OUT, draw_pair
from ether_diffusion.playground.world import Region
from ether_diffusion.training.batches import Batch, TrainingSamples, micro_batches, to_batch
from ether_diffusion.training.condition_maps import SegmentedPairs
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.controls import EncoderControl, make_control
from ether_diffusion.training.finish import finish
from ether_diffusion.training.launch import control as main
from ether_diffusion.training.loop import Lane, LoopSettings, Task, train
from ether_diffusion.training.lora_export import check_export
from ether_diffusion.training.model import DenoisingModel
from ether_diffusion.training.program import Start, record_start, start_run
from ether_diffusion.training.prompts import settle_prompts
from ether_diffusion.training.samples import Sampler, Shown
from ether_diffusion.training.sections import (
    AdapterSection,
    BatchSection,
    ComputeSection,
    ControlSection,
    HubSection,
    SampleSection,
    SavingSection,
)
from ether_diffusion.training.seen import PLANNED, Stream, seen_by
from ether_diffusion.training.setup import prepare_modules
from ether_diffusion.training.summary import pairs_of, summary
from ether_diffusion.training.trainables import check_trainables, make_trainables
from ether_diffusion.training.validation import STREAM as STREAM_VALIDATION
from ether_diffusion.training.validation import Validation

__all__ = ["main", "run"]

STREAM = "pairs"


def run(config: ControlConfig) -> Path:
    """Train as ``config`` says, and return the path of the report.

    Raises:
        BaseModelError: the base or the ControlNet cannot be loaded.
        FileExistsError: the run folder holds a run already.
        FileNotFoundError: a folder is missing, or there is nothing to resume.
        ValueError: settings, pairs and model do not fit together.
        TrainingDivergedError: the loss became NaN or infinite.
        TrainingInterruptedError: Ctrl-C or SIGTERM.
    """
    listing: list[PairFiles] = []
    with start_run(config, lambda: listing.extend(list_files(config))) as start:
        return _train(start, listing)


def _train(start: Start[ControlConfig], listing: list[PairFiles]) -> Path:
    config, accelerator = start.config, start.accelerator
    beside, new = start.training_adapter, config.controlnet_model_name_or_path is None
    if config.control == "controlnet" and new and beside is not None and beside.shared:
        raise ValueError(
            "training_adapter: a new ControlNet is a copy of the base's layers, which a LoRA is around; give an ETHER "
            "file, or the ControlNet to start from, --controlnet_model_name_or_path"
        )
    start.family.pipe.to(accelerator.device)
    control = make_control(start.family, config.section(ControlSection))
    family = start.family = control.family
    check_trainables(control.components, config.section(AdapterSection))
    objective = family.objective(config.section(ObjectiveSettings))
    sampler = Sampler(family, config.section(SampleSection), accelerator, control, start.training_adapter)
    with accelerator.main_process_first():  # the others read the maps that it made
        source = make_source(config, listing, accelerator)
    if isinstance(control, EncoderControl) and config.has_maps:
        control.expects(classes_of(config, source))
    config = settle_prompts(start, [*source.captions(), *config.validation_prompt])
    pairs = make_pairs(config, source, family.divisor)
    shown = make_shown(config, pairs)
    trainables = [*make_trainables(control.components, config.section(AdapterSection)), *control.trainables]
    check_export(family, trainables, config.export_lora)
    model = DenoisingModel(family, trainables, objective, control=control)
    prepare_modules(family, config.section(ComputeSection))
    batching = config.section(BatchSection)
    stream = stream_of(pairs, batching, accelerator)
    seen = seen_by(config.output_dir, start.checkpoint, [stream]) if stream else None
    planned = {PLANNED: seen.until(config.max_train_steps)} if seen else {}
    provenance = record_start(start, trainables, {"training_pairs": len(pairs.source), **_facts(listing), **planned})
    validation = Validation(validation_samples(config, pairs, family, objective), family, objective, accelerator.device)
    lane = Lane(
        config.section(SavingSection),
        config.section(HubSection),
        trainables,
        sampler,
        shown,
        provenance,
        validation=validation,
        seen=seen,
    )
    start.summary = summary(start, [lane], pairs_of(pairs))
    make = partial(batches, pairs, batching, accelerator, family, objective)
    train(Task(family, model, make, [lane], start.begin), LoopSettings.of(config), accelerator, start.checkpoint)
    return finish(family.pipe, [lane], accelerator)


def _facts(listing: list[PairFiles]) -> dict[str, Any]:
    """What the provenance says of a folder's pairs: a hash of names, captions and sizes, for there may be thousands."""
    if not listing:
        return {}
    digest = hashlib.sha256()
    for entry in listing:
        sizes = [path.stat().st_size for path in (entry.image, entry.condition) if path is not None]
        digest.update(f"{entry.name}\0{list(entry.captions)}\0{sizes}\n".encode())
    return {"pictures": {"names, captions and sizes of all pairs": digest.hexdigest()[:16]}}


def list_files(config: ControlConfig) -> list[PairFiles]:
    """The lines of the training folder; none for the playground and datasets of the Hub.

    Raises:
        FileNotFoundError: there is no such folder, or no listing where conditions are to be given.
        ValueError: a line is not what it should be, or has no condition.
    """
    if config.train_data_dir in (None, PLAYGROUND):
        return []
    folder, made = Path(str(config.train_data_dir)), config.condition in ("canny", "segmentation")
    columns = Columns(config.image_column, config.conditioning_image_column, config.caption_column)
    try:
        entries = read_listing(folder, columns, allow_outside_paths=config.allow_outside_paths)
    except FileNotFoundError:
        if not made or not folder.is_dir():
            raise
        entries = plain_listing(folder)
    if made:
        return [replace(entry, condition=None) for entry in entries]
    if without := [entry for entry in entries if entry.condition is None]:
        raise ValueError(
            f"{len(without)} of {len(entries)} pictures of {folder} have no {columns.condition}, the first is "
            f"{without[0].name}: add them, or make them with --condition canny or --condition segmentation"
        )
    return entries


def make_source(config: ControlConfig, listing: list[PairFiles], accelerator: Accelerator) -> PairSource:
    """The pairs that the settings name; semantic maps are made here, where a model is to make them.

    Raises:
        ImportError: a package is missing.
        OSError: the segmenter cannot be loaded.
        ValueError: files are missing or broken, sizes differ, or the dataset has no such columns.
    """
    given = config.condition in ("image", "map")
    if config.dataset_name is not None:
        columns = Columns(config.image_column, config.conditioning_image_column, config.caption_column)
        source: PairSource = DatasetPairs(config.dataset_name, columns, condition=given, maps=config.has_maps)
    elif config.train_data_dir == PLAYGROUND:
        return EndlessPairs(partial(draw_pair, config.seed, with_map=given))
    else:
        source = FolderPairs(listing, maps=config.has_maps)
    if config.condition != "segmentation":
        return source
    folder = config.cache_folder / "maps"
    return SegmentedPairs(source, str(config.segmenter), folder, accelerator.device)


def classes_of(config: ControlConfig, source: PairSource) -> list[str] | None:
    """The names of the classes of the maps by id; None where nobody says what given maps hold."""
    if isinstance(source, SegmentedPairs):
        return source.classes
    return [region.name.lower() for region in Region] if config.train_data_dir == PLAYGROUND else None


def make_pairs(config: ControlConfig, source: PairSource, factor: int) -> ControlPairs:
    """The pairs as training examples."""
    return ControlPairs(
        source,
        int(config.resolution or 0),
        Augmentation(config.center_crop, config.random_flip),
        config.proportion_empty_prompts,
        (config.canny_low, config.canny_high),
        smooth=not config.has_maps,
        divisible_by=factor,
    )


def make_shown(config: ControlConfig, pairs: ControlPairs) -> list[Shown]:
    """What the sample grids show: the given conditions, or those of the first pairs, of unseen ones if endless.

    Raises:
        UnreadableImageError, OSError: a condition cannot be read.
    """
    if config.validation_image:
        images = [load_condition(path, config.has_maps) for path in config.validation_image]
        return [Shown(prompt, pairs.cut(image)) for prompt, image in zip(config.validation_prompt, images, strict=True)]
    if pairs.source.endless:
        source = EndlessPairs(partial(draw_pair, HELD_OUT, with_map=config.condition == "map"))
        pairs = make_pairs(config, source, 1)
    count = config.num_validation_pairs if pairs.source.endless else min(config.num_validation_pairs, len(pairs.source))
    asked = list(config.validation_prompt)
    seen = [pairs.shown(index) for index in range(count)]
    return [
        Shown(asked[index % len(asked)] if asked else pair.prompt, pair.condition) for index, pair in enumerate(seen)
    ]


def validation_samples(
    config: ControlConfig, pairs: ControlPairs, family: Family, objective: Objective
) -> TrainingSamples[ControlPairs]:
    """The first pairs, of an endless source unseen ones, cut in the middle and with their captions."""
    source = pairs.source
    if source.endless:
        source = EndlessPairs(partial(draw_pair, HELD_OUT, with_map=config.condition in ("image", "map")))
    still = replace(config, center_crop=True, random_flip=False, proportion_empty_prompts=0.0)
    return TrainingSamples(
        make_pairs(still, source, family.divisor), STREAM_VALIDATION, config.validation_seed, family, objective
    )


def stream_of(pairs: ControlPairs, section: BatchSection, accelerator: Accelerator) -> Stream | None:
    """Which pair each sample is; none of an endless source, whose samples are its pairs in their order."""
    if pairs.source.endless:
        return None
    count, seed = len(pairs.source), generator(section.seed, STREAM).initial_seed()
    return Stream(STREAM, BatchPlan([0] * count, section.batch_size(accelerator.num_processes), seed), count)


def batches(
    pairs: ControlPairs,
    section: BatchSection,
    accelerator: Accelerator,
    family: Family,
    objective: Objective,
    first_step: int,
    end_step: int,
) -> Iterator[list[list[Batch]]]:
    """This process's micro-batches of the steps."""
    stream = stream_of(pairs, section, accelerator)
    plan = stream.plan if stream else EndlessPlan(section.batch_size(accelerator.num_processes))
    samples = TrainingSamples(pairs, STREAM, section.seed, family, objective, section.noise_offset)
    process = (accelerator.process_index, accelerator.num_processes)
    steps, workers = (first_step, end_step), section.dataloader_num_workers
    for (stacked,) in micro_batches([(samples, plan)], steps, section.train_batch_size, process, workers):
        yield [[to_batch(stacked, family, objective, accelerator.device)]]
