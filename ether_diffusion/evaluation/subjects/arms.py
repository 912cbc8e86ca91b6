"""The arms of a benchmark: what is trained, the anchors that give every column its scale, and the jobs of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ether_diffusion.data.randomness import generator
from ether_diffusion.evaluation.runner import Job
from ether_diffusion.evaluation.settings import not_the_default
from ether_diffusion.evaluation.subjects.protocols import Subject
from ether_diffusion.evaluation.subjects.settings import ANCHORS, COPIES, NOISE, TRUTH, BenchmarkConfig
from ether_diffusion.images import list_images, load_image
from ether_diffusion.registry import METHODS, MethodEntry
from ether_diffusion.runs.drawing import Asked
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

DRAWING = ("token", "images_per_prompt", "class_images", "num_inference_steps", "guidance_scale")
"""Settings of a benchmark that its images depend on, beside those of the training."""
Answer = Callable[[Asked, Subject], Iterator[Image.Image]]
"""From what is asked and the subject to the pictures."""


def true_answers(asked: Asked, subject: Subject) -> Iterator[Image.Image]:
    """To each of the subject's own prompts one of its ``answers``, by the seed that is asked."""
    each = len(asked.prompts) // len(subject.answers)
    for number, seed in enumerate(asked.seeds):
        answers = subject.answers[number // each]
        yield load_image(answers[seed % len(answers)])


def copied_answers(asked: Asked, subject: Subject) -> Iterator[Image.Image]:
    """The references in turn."""
    references = list_images(subject.references)
    for number in range(len(asked.prompts)):
        yield load_image(references[number % len(references)])


def noisy_answers(asked: Asked, subject: Subject) -> Iterator[Image.Image]:
    """Uniform noise of the first reference's size, from the seeds that are asked."""
    width, height = load_image(list_images(subject.references)[0]).size
    for seed in asked.seeds:
        pixels = np.random.default_rng(seed % 2**63).integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield Image.fromarray(pixels)


ANSWERS: dict[str, Answer] = {TRUTH: true_answers, COPIES: copied_answers, NOISE: noisy_answers}
"""The anchors that no model draws."""


def anchors_of(subject: Subject) -> list[str]:
    """The anchors of a subject; without a known truth there is none of :data:`TRUTH`."""
    return [name for name in ANCHORS if name != TRUTH or subject.truths]


def is_anchor(job: Job[Subject]) -> bool:
    """Whether the job trains nothing."""
    return job.arm in ANCHORS


def method_of(job: Job[Subject]) -> MethodEntry:
    """What trains."""
    return METHODS[str(job.settings.get("method", DreamBoothConfig.method))]


def strengths_of(job: Job[Subject], config: BenchmarkConfig) -> dict[str, float]:
    """The further strengths at which the job draws, by the kind of its images: ``images@0.5``."""
    if is_anchor(job) or not method_of(job).has_strength:
        return {}
    return {f"images@{strength:g}": strength for strength in config.strengths}


def settings_hash(job: Job[Subject], config: BenchmarkConfig) -> str:
    """Stands for all that its images depend on: training, references and drawing, but for the base's weights."""
    settings: dict[str, Any] = {name: getattr(config, name) for name in DRAWING}
    settings |= {
        "base": config.base.name,
        **config.base.version,
        **({"base_config": config.base.config} if config.base.config else {}),
        "training": job.settings,
        "prompts": _training_prompts(job, config),
        **not_the_default(config.encoding),
    }
    settings |= {"asked": job.subject.prompts, "references": job.subject.fingerprint}
    settings["unrelated"] = job.subject.unrelated if config.drift else ()
    if strengths := strengths_of(job, config):  # as if there were none: hashes without them go on standing for the same
        settings["strengths"] = strengths
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def asked_of(job: Job[Subject], config: BenchmarkConfig) -> dict[str, Asked]:
    """All images of the job: of the subject, of the class, for unrelated prompts; every arm has the same seeds."""

    def ask(stream: str, prompts: Sequence[str], each: int) -> Asked:
        asked = [prompt for prompt in prompts for _ in range(each)]
        return Asked(asked, [generator(job.seed, stream, number).initial_seed() for number in range(len(asked))])

    images = ask("image", _prompts(job, config), config.images_per_prompt)
    if job.arm == TRUTH:  # it is known for the subject's own prompts
        return {"images": images, "class_images": Asked([], []), "unrelated": Asked([], [])}
    return {
        "images": images,
        "class_images": ask("class", _training_prompts(job, config)[1:], config.class_images),
        "unrelated": ask("unrelated", job.subject.unrelated, int(config.drift)),
        **dict.fromkeys(strengths_of(job, config), images),
    }


def truths_of(job: Job[Subject], config: BenchmarkConfig) -> dict[str, tuple[Path, ...]]:
    """The true pictures of each prompt, where they are known."""
    return dict(zip(_prompts(job, config), job.subject.truths, strict=True)) if job.subject.truths else {}


def training_of(job: Job[Subject], config: BenchmarkConfig, folder: Path) -> DreamBoothConfig:
    """The settings of its training run, which draws samples only if it says how many; class images are shared by class.

    Raises:
        ValueError: a setting is not one of train_dreambooth.py's, or impossible.
    """
    instance_prompt, class_prompt = _training_prompts(job, config)
    own = {
        "output_dir": folder,
        "seed": job.seed,
        "instance_data_dir": job.subject.references,
        "instance_prompt": instance_prompt,
        "class_prompt": class_prompt,
    }
    settings = {"num_validation_images": 0, **job.settings, **own}
    if settings.get("with_prior_preservation"):
        shared = config.output_dir / "class_images" / job.subject.class_word.replace(" ", "-")
        settings.setdefault("class_data_dir", shared)
    settings.setdefault("checkpointing_steps", 200)
    settings.setdefault("checkpoints_total_limit", 1)
    try:
        return DreamBoothConfig(**settings)
    except TypeError as error:
        raise ValueError(f"arm {job.arm}: {error}") from None


def _prompts(job: Job[Subject], config: BenchmarkConfig) -> list[str]:
    """The subject's prompts with the token."""
    return [prompt.format(token=config.token) for prompt in job.subject.prompts]


def _training_prompts(job: Job[Subject], config: BenchmarkConfig) -> list[str]:
    """The prompts of the training: of the subject, and of its class."""
    words = {"token": config.token, "class": job.subject.class_word}
    return [prompt.format(**words) for prompt in (config.instance_prompt, config.class_prompt)]


def all_jobs(config: BenchmarkConfig, subjects: list[Subject]) -> list[Job[Subject]]:
    """Every job of a benchmark, subject by subject, the anchors first.

    Raises:
        ValueError: a learning rate is no number.
    """
    arms: list[tuple[str, dict[str, Any], float | None]] = []
    for name in config.arms:
        settings, named = config.settings_of(name), config.arms[name].get("learning_rate") is not None
        settings.pop("learning_rate", None)
        for rate in config.rates_of(name):
            own = settings if rate is None else {**settings, "learning_rate": rate}
            arms.append((name, own, rate if named else None))
    return [
        Job(name, settings, subject, seed, rate)
        for subject in subjects
        for seed in config.seeds
        for name, settings, rate in [*((anchor, {}, None) for anchor in anchors_of(subject)), *arms]
    ]
