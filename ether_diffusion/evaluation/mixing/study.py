"""The study: train each subject of a pair alone, draw both in one picture, compare with true drawings of both.

docs/studies/two-adapters.md has the plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ether_diffusion.data.randomness import generator
from ether_diffusion.evaluation.mixing.findings import PairResult, write_findings
from ether_diffusion.evaluation.mixing.settings import ANCHORS, BASE, TRUTH, MixingConfig
from ether_diffusion.evaluation.mixing.ways import pipelines_of, ways_of
from ether_diffusion.evaluation.on_base import StudyOnBase
from ether_diffusion.evaluation.runner import Job, remove_training, train
from ether_diffusion.evaluation.settings import not_the_default
from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.metrics.fidelity import pair_similarity, prompt_similarity, without_token
from ether_diffusion.metrics.judges import load_judges
from ether_diffusion.metrics.scoring import Judges
from ether_diffusion.playground.world import (
    BACKGROUNDS,
    Subject,
    draw,
    subject,
    true_company,
    where_phrases,
    write_subject,
)
from ether_diffusion.reading import read_json
from ether_diffusion.registry import METHODS, MethodEntry
from ether_diffusion.runs.drawing import Asked, own_guidance
from ether_diffusion.runs.drawing import draw as draw_asked
from ether_diffusion.training import dreambooth
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

TRUTHS, ANSWERS = 8, 4
"""True drawings of each prompt: those that pictures are compared with, and others in the place of perfect answers."""


@dataclass(frozen=True)
class Couple:
    """Two subjects of the playground; the first stands on the left."""

    first: Subject
    second: Subject

    @property
    def name(self) -> str:
        """Unique, fit for a folder."""
        return f"{self.first.name}+{self.second.name}"

    def prompts(self, tokens: Sequence[str]) -> list[str]:
        """One for each background: "a qwe robot and a sks fish on a beach"."""
        first, second = (f"a {t} {s.class_word}" for t, s in zip(tokens, (self.first, self.second), strict=True))
        return [f"{first} and {second} {where_phrases(background)[0]}" for background in BACKGROUNDS]

    def truths(self) -> list[list[Image.Image]]:
        """True drawings of each prompt: ``TRUTHS`` to compare with, then ``ANSWERS``."""
        numbers = range(TRUTHS + ANSWERS)
        return [
            [draw(true_company(self.first, self.second, background, 0, index)).image for index in numbers]
            for background in BACKGROUNDS
        ]


@dataclass
class Mixing(StudyOnBase[Couple]):
    """Where the pairs are trained, drawn and scored."""

    config: MixingConfig
    judges: Judges
    device: torch.device

    @classmethod
    def load(cls, config: MixingConfig, device: torch.device) -> Mixing:
        """Load the judges.

        Raises:
            ImportError, OSError, ValueError: a judge is missing, a subject unknown, or a method cannot be added.
        """
        for arm, settings in config.arms.items():
            ways_of(_entry(settings))
            if "learning_rate" not in settings:
                raise ValueError(f"arm {arm}: name its learning_rate")
        return cls(config, load_judges(config.dino, config.clip, device=device), device)

    @property
    def output_dir(self) -> Path:
        """Where runs, images and results go."""
        return self.config.output_dir

    @cached_property
    def guidance(self) -> float:
        """As given, or the base's own."""
        given = self.config.guidance_scale
        return own_guidance(self.config.base) if given is None else given

    def jobs(self) -> list[Job[Couple]]:
        """Every pair with each anchor and each arm; every mistake in the settings shows here."""
        couples = [Couple(subject(first), subject(second)) for first, second in self.config.pairs]
        arms: dict[str, dict[str, Any]] = {anchor: {} for anchor in ANCHORS}
        arms |= {arm: {**self.config.training, **settings} for arm, settings in self.config.arms.items()}
        jobs = [Job(arm, settings, each, self.config.seed) for each in couples for arm, settings in arms.items()]
        for job in jobs:
            if job.arm not in ANCHORS:
                for number in (0, 1):
                    self._training(job, number)
        return jobs

    def write_outline(self, jobs: Sequence[Job[Couple]]) -> None:
        """Write the settings."""
        settings = {name: value for name, value in asdict(self.config).items() if name != "shard"}
        write_text(self.output_dir / "mixing.json", json.dumps(settings, indent=1, default=str))

    def run_job(self, job: Job[Couple]) -> None:
        """Train both subjects, draw every way, score; the result is written last.

        Raises:
            ValueError: a result is there that was made with other settings or from another base.
        """
        path = self._path("results", job, ".json")
        mark = hashlib.sha256(json.dumps(self._identity(job), sort_keys=True, default=str).encode()).hexdigest()[:12]
        if path.is_file():
            if read_json(path, dict).get("settings_hash") != mark:
                raise ValueError(
                    f"{path} was made with other settings or from another base: remove it, or choose another output_dir"
                )
            return
        ways = {}
        for way, pictures in self._drawn(job):
            folder = self._path("images", job) / way.replace(" ", "-")
            with atomic_path(folder) as temporary:
                temporary.mkdir(parents=True)
                for number, picture in enumerate(pictures):
                    picture.save(temporary / f"{number:04d}.png")
            ways[way] = self._score(job, folder)
        result = PairResult(job.arm, job.subject.name, job.seed, mark, ways, self.judges.identity)
        write_text(path, json.dumps(asdict(result)))
        for number in (0, 1):
            run = self._run(job, number)
            if run.exists():
                remove_training(run)

    def summarize(self, jobs: Sequence[Job[Couple]]) -> tuple[str, list[str]]:
        """Write ``mixing.md``, ``findings.json`` and the sheet of pictures of what is done."""
        paths = {job.key: self._path("results", job, ".json") for job in jobs}
        results = [PairResult(**read_json(path, dict)) for path in paths.values() if path.is_file()]
        missing = [key for key, path in paths.items() if not path.is_file()]
        return write_findings(self.output_dir, results, missing), missing

    def _identity(self, job: Job[Couple]) -> dict[str, Any]:
        names = ("tokens", "images_per_prompt", "num_inference_steps")
        return {name: getattr(self.config, name) for name in names} | {
            "guidance": self.guidance,
            "base": self.base_hashes,
            "training": job.settings,
            "pair": job.subject.name,
            "seed": job.seed,
            "judges": self.judges.weights,
            **not_the_default(self.config.encoding),
        }

    def _drawn(self, job: Job[Couple]) -> Iterator[tuple[str, list[Image.Image]]]:
        """Each way of the job with its pictures, all from the same seeds."""
        asked = self._asked(job)
        if job.arm == TRUTH:
            answers = job.subject.truths()
            each = self.config.images_per_prompt
            yield TRUTH, [answers[n // each][TRUTHS + n % each % ANSWERS] for n in range(len(asked.prompts))]
        elif job.arm == BASE:
            yield BASE, self._draw(self.base, asked)
        else:
            runs = (self._trained(job, 0), self._trained(job, 1))
            entry, device = _entry(job.settings), str(self.device)
            for way, pipe in pipelines_of(entry, self.config.base, runs, device):
                yield way, self._draw(pipe, asked)

    def _draw(self, pipe: Any, asked: Asked) -> list[Image.Image]:
        config = self.config
        settings = (config.batch_size, config.num_inference_steps, self.guidance, config.encoding)
        return list(draw_asked(pipe, asked, *settings))

    def _asked(self, job: Job[Couple]) -> Asked:
        each = self.config.images_per_prompt
        prompts = [prompt for prompt in job.subject.prompts(self.config.tokens) for _ in range(each)]
        return Asked(prompts, [generator(job.seed, "pair", n).initial_seed() for n in range(len(prompts))])

    def _trained(self, job: Job[Couple], number: int) -> Path:
        config = self._training(job, number)
        if not config.instance_data_dir.exists():
            write_subject(config.instance_data_dir.name, config.instance_data_dir)
        train(config, dreambooth.run, f"{config.hash()} {self.base_hashes}")
        return config.output_dir

    def _training(self, job: Job[Couple], number: int) -> DreamBoothConfig:
        """The training of the first or the second subject of a pair.

        Raises:
            ValueError: a setting is not one of train_dreambooth.py's, or impossible.
        """
        individual = (job.subject.first, job.subject.second)[number]
        own = {
            "output_dir": self._run(job, number),
            "seed": job.seed,
            "instance_data_dir": self.output_dir / "subjects" / individual.name,
            "instance_prompt": f"a photo of a {self.config.tokens[number]} {individual.class_word}",
            "num_validation_images": 0,
        }
        try:
            return DreamBoothConfig(**{**job.settings, **own})
        except TypeError as error:
            raise ValueError(f"arm {job.arm}: {error}") from None

    def _score(self, job: Job[Couple], folder: Path) -> list[dict[str, Any]]:
        """A row for each picture: its prompt, truth-likeness and CLIP-T."""
        prompts, each = self._asked(job).prompts, self.config.images_per_prompt
        paths = [folder / f"{number:04d}.png" for number in range(len(prompts))]
        looks = self.judges.dino.image_features(paths)
        truths = [self.judges.dino.image_features(pictures[:TRUTHS]) for pictures in job.subject.truths()]
        plain = [without_token(without_token(p, self.config.tokens[0]), self.config.tokens[1]) for p in prompts]
        fits = prompt_similarity(self.judges.clip.image_features(paths), self.judges.clip.text_features(plain))
        return [
            {
                "file": str(path.relative_to(self.output_dir)),
                "prompt": prompt,
                "truth": pair_similarity(looks[n : n + 1], truths[n // each]).mean().item(),
                "clip_t": fits[n].item(),
            }
            for n, (path, prompt) in enumerate(zip(paths, prompts, strict=True))
        ]

    def _run(self, job: Job[Couple], number: int) -> Path:
        return self._path("runs", job) / ("first", "second")[number]

    def _path(self, kind: str, job: Job[Couple], suffix: str = "") -> Path:
        return self.output_dir / kind / f"{job.key}{suffix}"


def _entry(settings: Mapping[str, Any]) -> MethodEntry:
    return METHODS[str(settings.get("method", DreamBoothConfig.method))]
