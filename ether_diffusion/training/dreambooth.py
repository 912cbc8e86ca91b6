"""DreamBooth (arXiv 2208.12242): from a folder of photos to the weights of a subject."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ether_diffusion.data.augment import Augmentation
from ether_diffusion.data.cache import TensorCache
from ether_diffusion.data.captions import Picture, list_pictures, prompts_of
from ether_diffusion.data.metadata import read_metadata
from ether_diffusion.data.options import FolderOptions
from ether_diffusion.data.plan import BatchPlan
from ether_diffusion.data.randomness import generator
from ether_diffusion.data.subject import SubjectFolder
from ether_diffusion.families.protocol import Family, Objective
from ether_diffusion.families.settings import ObjectiveSettings
from ether_diffusion.images import is_picture_name, list_files
from ether_diffusion.runs.checksums import sha256
from ether_diffusion.runs.folder import changed_settings, open_run_folder
from ether_diffusion.runs.outputs import check_outputs
from ether_diffusion.training.batches import Batch, TrainingSamples, encode_once, join, micro_batches, to_batch
from ether_diffusion.training.choosing import Choosing, judges_for
from ether_diffusion.training.class_images import generate_class_images
from ether_diffusion.training.conditioning import encode_prompts_once
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.finish import finish
from ether_diffusion.training.launch import dreambooth as main
from ether_diffusion.training.loop import Lane, LoopSettings, Task, train
from ether_diffusion.training.lora_export import check_export
from ether_diffusion.training.model import DenoisingModel
from ether_diffusion.training.new_token import make_token
from ether_diffusion.training.placement import present
from ether_diffusion.training.program import Start, record_start, start_run
from ether_diffusion.training.prompts import settle_prompts
from ether_diffusion.training.samples import Sampler, Shown
from ether_diffusion.training.sections import (
    AdapterSection,
    BatchSection,
    ChoosingSection,
    ComputeSection,
    HubSection,
    NewTokenSection,
    SampleSection,
    SavingSection,
)
from ether_diffusion.training.seen import BUCKETS, PLANNED, Seen, Stream, seen_by
from ether_diffusion.training.setup import prepare_modules
from ether_diffusion.training.subjects import subjects_of
from ether_diffusion.training.summary import pictures_of, summary
from ether_diffusion.training.trainables import (
    ADAPTER_NAME,
    check_trainables,
    make_trainables,
    trained_components,
)
from ether_diffusion.training.validation import PICTURES, STREAM, Validation
from ether_diffusion.training.validation_prompts import default_prompts

__all__ = ["main", "run"]

logger = logging.getLogger(__name__)


def run(config: DreamBoothConfig) -> Path:
    """Train as ``config`` says, and return the path of the report.

    Raises:
        BaseModelError: the base cannot be loaded.
        FileExistsError: the run folder holds a run already.
        FileNotFoundError: a folder is missing, or there is nothing to resume.
        ValueError: settings, pictures and model do not fit together.
        TrainingDivergedError: the loss became NaN or infinite.
        TrainingInterruptedError: Ctrl-C or SIGTERM.
    """
    folders = lambda: [each.output_dir for each in subjects_of(config).values()]  # noqa: E731
    with start_run(config, lambda: check_subjects(config), folders) as start:
        return _train(start)


def _train(start: Start[DreamBoothConfig]) -> Path:
    config, accelerator, family = start.config, start.accelerator, start.family
    if config.subjects_dir is not None and family.PER_SAMPLE is not None:
        raise ValueError(
            f"subjects_dir cannot train {family.TITLE}: {family.PER_SAMPLE}; train the subjects one by one"
        )
    if config.subjects_dir is not None and start.training_adapter and not start.training_adapter.shared:
        raise ValueError(
            "training_adapter: with subjects_dir every sample has one adapter of this library; give a LoRA, which acts "
            "on all samples"
        )
    components = trained_components(family, config.section(AdapterSection))
    check_trainables(components, config.section(AdapterSection))
    if config.encodes_prompts:
        for encoder in family.text_encoders.values():
            encoder.to(accelerator.device)
    token = make_token(family, config.section(NewTokenSection))  # before prompts are counted in tokens
    config = settle_prompts(start, prompts_of_run(config))
    objective = family.objective(config.section(ObjectiveSettings))
    batching = config.section(BatchSection)
    subjects = subjects_of(config)
    shown = [_shown(each) for each in subjects.values()]
    judges = judges_for(config.section(ChoosingSection)) if accelerator.is_main_process else None
    samplers = [
        Sampler(family, each.section(SampleSection), accelerator, training_adapter=start.training_adapter)
        for each in subjects.values()
    ]
    texts = {prompt for each in subjects.values() for prompt in said(each)}
    embeds = None if config.train_text_encoder else _encode(start, texts)
    if not config.encodes_prompts:
        for each, own, sampler in zip(subjects.values(), shown, samplers, strict=True):
            sampler.know(_encode_for_drawing(start, [item.prompt for item in own] + _classes(each)))
    family.denoiser.to(accelerator.device)
    streams = [make_streams(objective, each, own) for each, own in zip(subjects.values(), samplers, strict=True)]
    held_out = [validation_samples(objective, each, family) for each in subjects.values()]
    sources = [*(stream for own in streams for stream in own), *held_out]
    if embeds is not None:  # class images may have captions of their own
        said_by = {text for stream in sources for prompts in stream.subject.prompts_of for text in prompts.all}
        embeds |= _encode(start, said_by - embeds.keys())
    if any(stream.cached is None for own in streams for stream in own):
        family.pipe.vae.to(accelerator.device)
    trainables = [
        make_trainables(components, each.section(AdapterSection), name or ADAPTER_NAME) + token
        for name, each in subjects.items()
    ]
    names = [name for name in subjects if name is not None]
    everything = [trainable for own in trainables for trainable in own]
    check_export(family, everything, config.export_lora)
    model = DenoisingModel(
        *(family, everything, objective, config.prior_loss_weight, embeds),
        adapters=names,
        placeholder_token=config.placeholder_token,
    )
    prepare_modules(family, config.section(ComputeSection))
    if names and start.checkpoint and accelerator.is_main_process:
        for name, each in subjects.items():
            for change in changed_settings(each.run, start.base_hash):
                logger.warning("resuming %s with another setting, %s", name, change)
    planned = [
        seen_by(each.output_dir, start.checkpoint, [stream_of(samples, batching, accelerator) for samples in own])
        for each, own in zip(subjects.values(), streams, strict=True)
    ]
    if accelerator.is_main_process:
        for seen in planned:
            _tell_buckets(seen, config.max_train_steps)
    together = record_start(start, everything, {"subjects": names}) if names else None
    choosing = [
        None if judges is None else Choosing(each.section(ChoosingSection), judges, accelerator.device)
        for each in subjects.values()
    ]
    facts = [
        {**_facts(own), **_planned(seen, config.max_train_steps), **({} if chosen is None else chosen.facts)}
        for own, seen, chosen in zip(streams, planned, choosing, strict=True)
    ]
    lanes = [
        Lane(
            each.section(SavingSection),
            each.section(HubSection),
            trainables[number],
            samplers[number],
            shown[number],
            record_start(start, trainables[number], facts[number], each),
            name,
            Validation(held_out[number], family, objective, accelerator.device),
            planned[number],
            choosing[number],
        )
        for number, (name, each) in enumerate(subjects.items())
    ]
    prior = streams[0][1].subject if len(lanes) == 1 and len(streams[0]) > 1 else None
    start.summary = summary(start, lanes, pictures_of([own[0].subject for own in streams], prior))
    make = partial(batches, streams, batching, accelerator, family, objective)
    task = Task(family, model, make, lanes, start.begin, together)
    train(task, LoopSettings.of(config), accelerator, start.checkpoint)
    report = finish(family.pipe, lanes, accelerator)
    if together is not None and accelerator.is_main_process:
        together.update(status="finished")
    return report


def said(config: DreamBoothConfig) -> list[str]:
    """The prompts of the photos, of the held-out ones, and of the class."""
    folders = [config.instance_data_dir, *([config.validation_data_dir] if config.validation_data_dir else [])]
    options, prompt = config.section(FolderOptions), config.instance_prompt
    pictures = [picture for folder in folders for picture in list_pictures(folder, options).pictures]
    return [text for picture in pictures for text in prompts_of(picture, prompt, options).all] + _classes(config)


def prompts_of_run(config: DreamBoothConfig) -> list[str]:
    """Every prompt of every subject: of photos, class images and sample grids.

    Raises:
        ValueError: pictures or metadata are not what they should be.
        OSError: a file cannot be read.
    """
    found = []
    for each in subjects_of(config).values():
        found += [*said(each), *(shown.prompt for shown in _shown(each)), *_class_captions(each)]
    return found


def _class_captions(config: DreamBoothConfig) -> list[str]:
    """Captions of class images of the user's own, where there are any yet."""
    folder, nested = class_folder(config), config.nested_folders
    if not (
        config.with_prior_preservation and folder.is_dir() and any(map(is_picture_name, list_files(folder, nested)))
    ):
        return []
    pictures = list_pictures(folder, plain_options(config)).pictures[: config.num_class_images]
    return [caption for picture in pictures for caption in picture.captions]


def class_folder(config: DreamBoothConfig) -> Path:
    """Where the class images are, or will be drawn."""
    return config.class_data_dir or config.output_dir / "class_images"


def plain_options(config: DreamBoothConfig) -> FolderOptions:
    """How captions of class images are read: as they are, for a prefix names the subject, which they do not show."""
    return FolderOptions(config.nested_folders, config.caption_column)


def _check_said(config: DreamBoothConfig) -> None:
    """Refuse a placeholder token that no training prompt has.

    Raises:
        ValueError: none has it.
    """
    token = config.placeholder_token
    if token is not None and not any(token in prompt for prompt in said(config)):
        raise ValueError(
            f"placeholder_token {token} is in no prompt of the photos: write it where it stands for the subject, as in "
            f'--instance_prompt "a photo of {token} dog"'
        )


def _classes(config: DreamBoothConfig) -> list[str]:
    return [config.class_prompt] if config.with_prior_preservation and config.class_prompt else []


def _encode(start: Start[DreamBoothConfig], prompts: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Prompts for training, encoded by text encoders that are on the device only meanwhile.

    Those with a token that is trained are left out: the model encodes them in every step.
    """
    family, accelerator, token = start.family, start.accelerator, start.config.placeholder_token
    if not (wanted := sorted(prompt for prompt in prompts if token is None or token not in prompt)):
        return {}
    # the others read what the main process cached
    with accelerator.main_process_first(), present(accelerator.device, *family.text_encoders.values()):
        return encode_prompts_once(family, wanted, TensorCache(start.config.cache_folder))


@torch.no_grad()
def _encode_for_drawing(start: Start[DreamBoothConfig], prompts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The same for sample grids and class images, with what guidance leads away from."""
    with present(start.accelerator.device, *start.family.text_encoders.values()):
        return {prompt: start.family.encode_for_drawing([prompt]) for prompt in dict.fromkeys(prompts)}


def check_subjects(config: DreamBoothConfig) -> None:
    """Look for the folders of photos and their metadata, and whether the run folders of several subjects are free.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder is missing.
        FileExistsError: a subject's run folder holds a run already.
        ValueError: class images would lie among the photos, metadata are not what they should be, or no prompt has the
            placeholder token.
    """
    for each in subjects_of(config).values():
        read_metadata(each.instance_data_dir, each.caption_column)
        _check_said(each)
        if each.validation_data_dir is not None:
            read_metadata(each.validation_data_dir, each.caption_column)
        if each.class_data_dir is not None and each.class_data_dir.resolve() == each.instance_data_dir.resolve():
            raise ValueError(
                f"class_data_dir and instance_data_dir are the same folder, {each.class_data_dir}: class images would "
                "become photos of the subject; choose another --class_data_dir"
            )
        if config.subjects_dir is not None and config.resume is None:
            open_run_folder(each.run)
        if config.subjects_dir is not None:
            check_outputs(each.output_dir, each.repository)


def _shown(config: DreamBoothConfig) -> list[Shown]:
    """What the sample grids show: the given prompts, or those that suit the subject."""
    if asked := list(config.validation_prompt):
        return [Shown(prompt) for prompt in asked]
    pictures = list_pictures(config.instance_data_dir, config.section(FolderOptions)).pictures
    base, paths = config.pretrained_model_name_or_path, [picture.path for picture in pictures]
    return [Shown(prompt) for prompt in default_prompts(config.instance_prompt, config.class_prompt, base, paths)]


def _facts(streams: list[TrainingSamples[SubjectFolder]]) -> dict[str, Any]:
    """What the provenance says of the pictures."""
    return {
        "instance_images": [str(path.resolve()) for path in streams[0].subject.paths],
        "class_images": len(streams[1].subject) if len(streams) > 1 else 0,
        "pictures": {
            f"{samples.stream}/{picture.name}": picture_hash(picture)
            for samples in streams
            for picture in samples.subject.pictures
        },
    }


def _planned(seen: Seen, end_step: int) -> dict[str, Any]:
    """What the provenance says of how often pictures are going to be shown."""
    buckets = seen.buckets(end_step)
    return {PLANNED: seen.until(end_step), **({BUCKETS: buckets} if buckets else {})}


def _tell_buckets(seen: Seen, end_step: int) -> None:
    """Log the buckets: a line for each size."""
    for name, found in seen.buckets(end_step).items():
        for row in found["sizes"]:
            times = f"{row['fewest']} to {row['most']}" if row["fewest"] < row["most"] else str(row["most"])
            logger.info(
                "%s, bucket of %d x %d pixels (height x width): %d picture%s, each seen once an epoch, %s times in all",
                *(name, row["height"], row["width"], row["pictures"], "s" * (row["pictures"] > 1), times),
            )


def picture_hash(picture: Picture) -> str:
    """Sixteen hexadecimal digits that stand for a picture's file and its captions; of one caption as in version 0.1."""
    several = len(picture.captions) > 1
    captions = json.dumps(picture.captions) if several else "".join(picture.captions)
    return hashlib.sha256(f"{sha256(picture.path)} {captions}".encode()).hexdigest()[:16]


def make_streams(
    objective: Objective, config: DreamBoothConfig, sampler: Sampler
) -> list[TrainingSamples[SubjectFolder]]:
    """The photos of the subject, and with prior preservation images of its class, generated where missing."""
    augmentation = Augmentation(config.center_crop, config.random_flip)
    family, options = sampler.family, config.section(FolderOptions)

    def stream(
        name: str, folder: Path, prompt: str, options: FolderOptions, limit: int | None = None
    ) -> TrainingSamples[SubjectFolder]:
        subject = SubjectFolder(
            folder,
            prompt,
            sampler.resolution,
            augmentation,
            config.aspect_ratio_buckets,
            family.divisor,
            limit,
            options,
        )
        if sampler.accelerator.is_main_process:
            for remark in subject.remarks():
                logger.warning("%s", remark)
        cached = None
        if subject.deterministic:
            # the others read what the main process cached
            with sampler.accelerator.main_process_first(), present(sampler.accelerator.device, family.pipe.vae):
                cached = encode_once(subject, family, TensorCache(config.cache_folder))
        return TrainingSamples(subject, name, config.seed, family, objective, config.noise_offset, cached)

    streams = [stream("instance", config.instance_data_dir, config.instance_prompt, options)]
    if config.with_prior_preservation and config.class_prompt:
        folder = class_folder(config)
        number = config.num_class_images
        size, nested = config.sample_batch_size, config.nested_folders
        generate_class_images(sampler, folder, config.class_prompt, number, size, config.seed, nested)
        streams.append(stream("prior", folder, config.class_prompt, plain_options(config), number))
    return streams


def validation_samples(
    objective: Objective, config: DreamBoothConfig, family: Family
) -> TrainingSamples[SubjectFolder]:
    """The held-out photos, or those of the training, cut in the middle."""
    folder = config.validation_data_dir or config.instance_data_dir
    buckets, resolution = config.aspect_ratio_buckets, config.resolution or family.native_resolution
    centred = Augmentation(center_crop=True)
    options = config.section(FolderOptions)
    subject = SubjectFolder(
        folder, config.instance_prompt, resolution, centred, buckets, family.divisor, PICTURES, options
    )
    return TrainingSamples(subject, STREAM, config.validation_seed, family, objective)


def stream_of(samples: TrainingSamples[SubjectFolder], section: BatchSection, accelerator: Accelerator) -> Stream:
    """Which picture each sample of a stream is."""
    subject, seed = samples.subject, generator(section.seed, samples.stream).initial_seed()
    sizes = subject.sizes if subject.use_buckets else []
    plan = BatchPlan(subject.sizes, section.batch_size(accelerator.num_processes), seed)
    return Stream(samples.stream, plan, len(subject), [picture.name for picture in subject.pictures], sizes)


def batches(
    lanes: list[list[TrainingSamples[SubjectFolder]]],
    section: BatchSection,
    accelerator: Accelerator,
    family: Family,
    objective: Objective,
    first_step: int,
    end_step: int,
) -> Iterator[list[list[Batch]]]:
    """This process's micro-batches of the steps: of every lane instance and class images side by side."""
    sources = [(samples, stream_of(samples, section, accelerator).plan) for streams in lanes for samples in streams]
    process = (accelerator.process_index, accelerator.num_processes)
    steps, workers = (first_step, end_step), section.dataloader_num_workers
    for parts in micro_batches(sources, steps, section.train_batch_size, process, workers):
        made = (to_batch(part, family, objective, accelerator.device) for part in parts)
        yield [join([next(made) for _ in streams]) for streams in lanes]
