"""DreamBooth (arXiv 2208.12242): from a folder of photos to the weights of a subject."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline

from ether_diffusion.data.augment import Augmentation
from ether_diffusion.data.images import check_folder
from ether_diffusion.data.plan import BatchPlan
from ether_diffusion.data.randomness import generator
from ether_diffusion.data.subject import SubjectFolder
from ether_diffusion.training.base_model import vae_factor
from ether_diffusion.training.batches import Batch, TrainingSamples, encode_once, join, micro_batches, to_batch
from ether_diffusion.training.class_images import generate_class_images
from ether_diffusion.training.conditioning import encode_prompts_once
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.diffusion import Objective
from ether_diffusion.training.finish import finish
from ether_diffusion.training.loop import Task, train
from ether_diffusion.training.model import DenoisingModel
from ether_diffusion.training.program import record_start, run_program, start_run
from ether_diffusion.training.samples import Sampler, Shown
from ether_diffusion.training.setup import make_cache, prepare_modules
from ether_diffusion.training.trainables import check_trainables, make_trainables, trained_components


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: parse the settings, train, and say where the result is.

    Raises:
        SystemExit: one clear line for what a user can mend; 128 + signal after Ctrl-C or SIGTERM, as shells do.
    """
    run_program(DreamBoothConfig, run, arguments)


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
    start = start_run(config, partial(check_folder, config.instance_data_dir))
    config, accelerator, pipe = start.config, start.accelerator, start.pipe
    components = trained_components(pipe, config)
    check_trainables(components, config)
    objective = Objective(DDPMScheduler.from_config(pipe.scheduler.config), config.snr_gamma)
    sampler = Sampler(pipe, config, accelerator)
    streams = make_streams(pipe, config, sampler)
    embeds = None
    if not config.train_text_encoder:
        prompts = [prompt for stream in streams for prompt in stream.subject.prompts]
        with accelerator.main_process_first():  # the others read what it cached
            embeds = encode_prompts_once(pipe, prompts, make_cache(config))
    trainables = make_trainables(components, config)
    model = DenoisingModel(pipe, trainables, objective, config.prior_loss_weight, embeds)
    prepare_modules(pipe, config)
    facts = {
        "instance_images": [str(path.resolve()) for path in streams[0].subject.paths],
        "class_images": len(streams[1].subject) if len(streams) > 1 else 0,
    }
    provenance = record_start(start, trainables, facts)
    prompts = list(config.validation_prompt) or [config.instance_prompt]
    task = Task(
        pipe,
        trainables,
        model,
        partial(batches, streams, config, accelerator, pipe),
        sampler,
        [Shown(prompt) for prompt in prompts],
    )
    train(task, config, accelerator, start.checkpoint, provenance)
    return finish(pipe, trainables, config, accelerator, provenance)


def make_streams(
    pipe: DiffusionPipeline, config: DreamBoothConfig, sampler: Sampler
) -> list[TrainingSamples[SubjectFolder]]:
    """The photos of the subject, and with prior preservation images of its class, generated where missing."""
    augmentation = Augmentation(config.center_crop, config.random_flip)
    scheduler = pipe.scheduler.config

    def stream(name: str, folder: Path, prompt: str, limit: int | None = None) -> TrainingSamples[SubjectFolder]:
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
    streams: list[TrainingSamples[SubjectFolder]],
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
