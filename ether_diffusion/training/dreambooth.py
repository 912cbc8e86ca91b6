"""DreamBooth (arXiv 2208.12242): from a folder of photos to the weights of a subject."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline

from ether_diffusion.checkpoint import first_line
from ether_diffusion.data.augment import Augmentation
from ether_diffusion.data.images import check_folder
from ether_diffusion.data.plan import BatchPlan
from ether_diffusion.data.randomness import generator
from ether_diffusion.data.subject import SubjectFolder
from ether_diffusion.fingerprint import base_hash
from ether_diffusion.training.base_model import (
    BaseModelError,
    load_base,
    native_resolution,
    text_encoders,
    vae_factor,
)
from ether_diffusion.training.batches import Batch, TrainingSamples, encode_once, join, micro_batches, to_batch
from ether_diffusion.training.class_images import generate_class_images
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.conditioning import encode_prompts_once
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.diffusion import Objective
from ether_diffusion.training.finish import finish
from ether_diffusion.training.loop import Task, TrainingDivergedError, TrainingInterruptedError, train
from ether_diffusion.training.model import DenoisingModel
from ether_diffusion.training.run_folder import (
    Provenance,
    changed_settings,
    clear_run_folder,
    open_run_folder,
    write_config,
)
from ether_diffusion.training.samples import Sampler, scheduler_class
from ether_diffusion.training.setup import make_accelerator, make_cache, prepare_modules
from ether_diffusion.training.trainables import check_trainables, make_trainables

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: parse the settings, train, and say where the result is.

    Raises:
        SystemExit: one clear line for what a user can mend; 128 + signal after Ctrl-C or SIGTERM, as shells do.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("ether_diffusion").setLevel(logging.INFO)
    config = parse_config(DreamBoothConfig, arguments)
    try:
        report = run(config)
    except (BaseModelError, ImportError, OSError, ValueError, TrainingDivergedError) as error:
        logger.debug("traceback", exc_info=True)
        raise SystemExit(f"error: {error}") from None
    except torch.OutOfMemoryError as error:
        advice = "--gradient_checkpointing, --mixed_precision bf16, a smaller --train_batch_size or --resolution"
        raise SystemExit(f"error: out of memory ({first_line(error)}); what helps: {advice}") from None
    except TrainingInterruptedError as error:
        print(error, file=sys.stderr)
        raise SystemExit(128 + error.signal) from None
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        print("stopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    print(f"weights and samples: {config.output_dir}\nreport: {report}")


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
    accelerator = make_accelerator(config)
    with accelerator.main_process_first():
        start = open_run_folder(config) if accelerator.is_main_process or config.resume else None
    check_folder(config.instance_data_dir)
    if config.sampler != "base":
        scheduler_class(config.sampler)
    pipe = load_base(config, accelerator.mixed_precision).to(accelerator.device)
    config = replace(
        config,
        mixed_precision=accelerator.mixed_precision,
        resolution=config.resolution or native_resolution(pipe),
        learning_rate=config.resolved_learning_rate,
    )
    hashes = {name: base_hash(getattr(pipe, name)) for name in ("unet", *text_encoders(pipe))}
    if start and accelerator.is_main_process:
        for change in changed_settings(config, hashes):
            logger.warning("resuming with another setting, %s", change)
    check_trainables(pipe, config)
    objective = Objective(DDPMScheduler.from_config(pipe.scheduler.config), config.snr_gamma)
    sampler = Sampler(pipe, config, accelerator)
    streams = make_streams(pipe, config, sampler)
    embeds = None
    if not config.train_text_encoder:
        prompts = [prompt for stream in streams for prompt in stream.subject.prompts]
        with accelerator.main_process_first():  # the others read what it cached
            embeds = encode_prompts_once(pipe, prompts, make_cache(config))
    trainables = make_trainables(pipe, config)
    model = DenoisingModel(pipe, trainables, objective, config.prior_loss_weight, embeds)
    prepare_modules(pipe, config)
    subject = streams[0].subject
    if accelerator.is_main_process and not start:
        clear_run_folder(config.output_dir)
    provenance = Provenance(
        config,
        {
            "base_hash": hashes,
            "device": str(accelerator.device),
            "threads": torch.get_num_threads(),
            "num_processes": accelerator.num_processes,
            "trained_parameters": {trainable.component: trainable.num_parameters() for trainable in trainables},
            "instance_images": [str(path.resolve()) for path in subject.paths],
            "class_images": len(streams[1].subject) if len(streams) > 1 else 0,
        },
    )
    if accelerator.is_main_process:
        write_config(config)
        provenance.update(status="running")
        if config.report_to:
            accelerator.init_trackers("ether-diffusion", {k: str(v) for k, v in config.to_dict().items()})
    task = Task(
        pipe,
        trainables,
        model,
        partial(batches, streams, config, accelerator, pipe),
        sampler,
        list(config.validation_prompt) or [config.instance_prompt],
    )
    train(task, config, accelerator, start, provenance)
    return finish(pipe, trainables, config, accelerator, provenance)


def make_streams(pipe: DiffusionPipeline, config: DreamBoothConfig, sampler: Sampler) -> list[TrainingSamples]:
    """The photos of the subject, and with prior preservation images of its class, generated where missing."""
    augmentation = Augmentation(config.center_crop, config.random_flip)
    scheduler = pipe.scheduler.config

    def stream(name: str, folder: Path, prompt: str, limit: int | None = None) -> TrainingSamples:
        subject = SubjectFolder(
            folder,
            prompt,
            sampler.resolution,
            augmentation,
            config.aspect_ratio_buckets,
            vae_factor(pipe),
            limit,
        )
        cached = None
        if subject.deterministic:
            show = sampler.accelerator.is_main_process
            with sampler.accelerator.main_process_first():  # the others read what it cached
                cached = encode_once(subject, pipe.vae, make_cache(config), show)
        channels, steps = pipe.vae.config.latent_channels, scheduler.num_train_timesteps
        return TrainingSamples(
            subject, name, config.seed, channels, vae_factor(pipe), steps, config.noise_offset, cached
        )

    streams = [stream("instance", config.instance_data_dir, config.instance_prompt)]
    if config.with_prior_preservation and config.class_prompt:
        folder = config.class_data_dir or config.output_dir / "class_images"
        number = config.num_class_images
        generate_class_images(sampler, folder, config.class_prompt, number, config.sample_batch_size, config.seed)
        streams.append(stream("prior", folder, config.class_prompt, number))
    return streams


def batches(
    streams: list[TrainingSamples],
    config: DreamBoothConfig,
    accelerator: Accelerator,
    pipe: DiffusionPipeline,
    first_step: int,
    end_step: int,
) -> Iterator[list[Batch]]:
    """This process's micro-batches of the steps: instance and class images side by side."""
    size = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    process = (accelerator.process_index, accelerator.num_processes)
    loaders = [
        micro_batches(
            samples,
            BatchPlan(samples.subject.sizes, size, generator(config.seed, samples.stream).initial_seed()),
            (first_step, end_step),
            config.train_batch_size,
            process,
            config.dataloader_num_workers,
        )
        for samples in streams
    ]
    for parts in zip(*loaders, strict=True):
        yield join([to_batch(part, pipe.vae, accelerator.device) for part in parts])
