"""Table 3 and Fig. 6: control accuracy of several methods at several learning rates, while they train.

Every job trains one arm at one rate with one seed, and stops at each of ``eval_steps`` to draw and score; a resumed
training is the uninterrupted one bit for bit, so the stops change nothing. What is done stays done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel

from ether_diffusion.data.pairs import read_listing
from ether_diffusion.evaluation.controls.findings import PAIRS, read_findings, read_result, write_outline
from ether_diffusion.evaluation.controls.pages import write_compared, write_study
from ether_diffusion.evaluation.controls.settings import VARIED, ControlStudyConfig
from ether_diffusion.evaluation.runner import (
    RESULTS,
    Job,
    Study,
    check_study_inputs,
    hash_changes,
    remove_training,
    train,
)
from ether_diffusion.files import write_text
from ether_diffusion.metrics.backbones import Backbone, load_clip
from ether_diffusion.metrics.control import ControlScores, score_control
from ether_diffusion.metrics.control_tasks import ControlTask, Pair, Segmentation
from ether_diffusion.metrics.distribution import load_feature_model
from ether_diffusion.metrics.segmentation import Segmenter
from ether_diffusion.pipelines.file import first_line
from ether_diffusion.pipelines.fingerprint import base_hash, base_hashes
from ether_diffusion.playground.pairs import write_pairs
from ether_diffusion.reading import read_bytes
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.control_drawing import Drawing
from ether_diffusion.runs.drawing import draw_samples, load_pipeline, load_run
from ether_diffusion.runs.folder import git_revision, read_provenance
from ether_diffusion.runs.record import read_run
from ether_diffusion.training import control
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.loop import TrainingDivergedError

STEADY = ("constant", "constant_with_warmup", "piecewise_constant")
"""Schedules that do not depend on how long the training will be."""


def training_of(job: Job[None], folder: Path, steps: int) -> ControlConfig:
    """The settings of a job's training, which draws no samples of its own.

    Raises:
        ValueError: a setting is not one of train_controlnet.py's, or impossible.
    """
    own = {"output_dir": folder, "max_train_steps": steps, "num_validation_images": 0}
    frequency = {"checkpointing_steps": steps, "checkpoints_total_limit": 1, "validation_steps": steps}
    try:
        config = ControlConfig(**frequency | job.settings | own)
    except TypeError as error:
        raise ValueError(f"arm {job.arm}: {error}") from None
    if config.lr_scheduler not in STEADY:
        raise ValueError(
            f"arm {job.arm}: lr_scheduler={config.lr_scheduler} depends on the training's length, which grows from "
            f"one evaluation to the next; use {', '.join(STEADY)}"
        )
    return config


def all_jobs(config: ControlStudyConfig) -> list[Job[None]]:
    """Every arm at every rate, the arms by turns, seed after seed, so that a study cut short has some of each.

    Raises:
        ValueError: two settings of an arm are lists, or one without a rate, or a rate is no number.
    """
    jobs: list[list[Job[None]]] = []
    for arm, own in config.arms.items():
        lists = [name for name in VARIED if isinstance(own.get(name), list)]
        if len(lists) > 1:
            raise ValueError(f"arm {arm}: only one of {', '.join(lists)} may be a list")
        named = lists or [name for name in VARIED if own.get(name) is not None]
        settings = {**config.training, **own}
        try:
            numbers = {name: settings[name] for name in VARIED if settings.get(name) is not None}
            settings |= {name: float(value) for name, value in numbers.items() if not isinstance(value, list)}
            values = own[lists[0]] if lists else [settings[name] for name in named[:1]]
            rates = list(dict.fromkeys(float(value) for value in values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"arm {arm}: a learning rate is no number: {error}") from None
        if named and not rates:
            raise ValueError(f"arm {arm}: {named[0]} is an empty list: name at least one rate")
        varied = [(rate, {**settings, named[0]: rate}) for rate in rates] if named else [(None, settings)]
        jobs.append([Job(arm, {**s, "seed": seed}, None, seed, rate) for seed in config.seeds for rate, s in varied])
    longest = max(map(len, jobs))
    return [of_arm[place] for place in range(longest) for of_arm in jobs if place < len(of_arm)]


@dataclass
class ControlStudy(Study[None]):
    """Where the jobs of a study of controls are done.

    Attributes:
        config: the study's settings.
        device: where to draw and judge.
    """

    config: ControlStudyConfig
    device: torch.device
    _bases: dict[tuple[Base, str | None], dict[str, str | None]] = field(default_factory=dict, init=False, repr=False)

    @property
    def output_dir(self) -> Path:
        """Where runs, pictures and results go."""
        return self.config.output_dir

    def jobs(self) -> list[Job[None]]:
        """Every arm at every rate, when data and judges are there."""
        check_study_inputs(self.output_dir, {"data": self.config.data})
        jobs = all_jobs(self.config)
        for job in jobs:
            training_of(job, self.output_dir, self.config.eval_steps[-1])  # a mistake shows before the first one runs
            self.check(job)
        _ = self.pairs, self.task, self.clip, self.features
        return jobs

    def write_outline(self, jobs: Sequence[Job[None]]) -> None:
        """Write ``study.json``."""
        write_outline(self.output_dir, [job.key for job in jobs], self.config.eval_steps[-1], self.config.data)

    def summarize(self, jobs: Sequence[Job[None]]) -> tuple[str, list[str]]:
        """Write tables, curves and a sheet of what is done, and the differences that are asked for."""
        text = write_study(self.output_dir)
        if self.config.compare_with and len(read_findings(self.output_dir).best) > 1:
            text += f"\n{write_compared(self.output_dir, self.config.compare_with)}"
        return text, [key for key, results in read_findings(self.output_dir).results.items() if not results]

    @cached_property
    def pairs(self) -> list[Pair]:
        """What is drawn and scored, the same for all jobs."""
        folder = self.config.data or self.config.output_dir / PAIRS
        if self.config.data is None and not folder.is_dir():
            try:
                write_pairs(folder, self.config.pairs)
            except OSError:
                if not folder.is_dir():  # another process was faster
                    raise
        entries = read_listing(folder, allow_outside_paths=self.config.allow_outside_paths)[: self.config.pairs]
        return [Pair(entry.name, entry.image, entry.condition, entry.prompt) for entry in entries]

    @cached_property
    def task(self) -> ControlTask:
        """The judge of the maps."""
        segmenter = Segmenter(self.config.segmenter, self.device)
        offset = segmenter.label_offset if self.config.label_offset is None else self.config.label_offset
        return Segmentation(segmenter, offset, self.config.ignore_index)

    @cached_property
    def clip(self) -> Any:
        """The judge of CLIP-T."""
        return None if self.config.clip is None else load_clip(self.config.clip, self.device)

    @cached_property
    def features(self) -> Backbone | None:
        """Whose features FID and KID compare."""
        name = self.config.fid_features
        return None if name is None else load_feature_model(name, self.device)

    def run_job(self, job: Job[None]) -> None:
        """Train to every evaluation step that has no result yet, draw and score there.

        Raises:
            ValueError: a result is there that was made with other settings.
            TrainingInterruptedError: Ctrl-C or SIGTERM; the same command goes on.
        """
        self.check(job)
        run = self.config.output_dir / "runs" / job.key
        for steps in self.config.eval_steps:
            result = self.config.output_dir / RESULTS / job.key / f"{steps:06d}.json"
            identity = self._identity(job)
            if result.is_file():
                if "diverged" in read_result(result):
                    break
                continue
            facts: dict[str, Any] = {"arm": job.arm, "rate": job.rate, "seed": job.seed, "steps": steps}
            facts |= {
                "identity": identity,
                "base_hash": self.base_of(job),
                "settings": job.settings,
                "git_revision": git_revision(),
            }
            try:
                train(training_of(job, run, steps), control.run, self._mark(job))
            except TrainingDivergedError as error:
                write_text(result, json.dumps(facts | {"diverged": first_line(error)}, default=str))
                break
            write_text(result, json.dumps(facts | self._score(job, run, steps), default=str))
        if not self.config.keep_runs and run.exists():
            remove_training(run)
            with suppress(OSError):  # another seed is there
                run.parent.rmdir()

    def check(self, job: Job[None]) -> None:
        """Refuse a result of the job that was made with other settings, from another base or by other judges.

        Results of 0.1 that lack a hash are taken where nothing else contradicts.

        Raises:
            ValueError: there is one; the message names both hashes.
            DamagedFileError: a result cannot be read.
        """
        for result in sorted((self.config.output_dir / RESULTS / job.key).glob("*.json")):
            known = read_result(result)
            changed = [] if known.get("identity") == self._identity(job) else ["other settings"]
            changed += [
                f"another base ({told})" for told in hash_changes(known.get("base_hash", {}), self.base_of(job))
            ]
            before = {name: judge.get("weights") for name, judge in known.get("judges", {}).items()}
            changed += [f"another judge ({told})" for told in hash_changes(before, self.judges)]
            if changed:
                reasons = " and ".join(changed)
                raise ValueError(f"{result} was made with {reasons}: remove it, or choose another output_dir")

    def base_of(self, job: Job[None]) -> dict[str, str | None]:
        """The identity of the job's base by component, its ControlNet among them where one is named."""
        names = (Base.of(job.settings), job.settings.get("controlnet_model_name_or_path"))
        if names not in self._bases:
            pipe = load_pipeline(names[0])
            hashes = base_hashes(pipe)
            if names[1] is not None:
                hashes["controlnet"] = base_hash(ControlNetModel.from_pretrained(names[1], dtype=torch.float32))
            self._bases[names] = hashes
        return self._bases[names]

    @cached_property
    def judges(self) -> dict[str, str]:
        """The hash of the weights of every judge, by the names of the results."""
        known = dict(self.task.judges)
        known |= {} if self.clip is None else {"clip": self.clip.identity}
        known |= {} if self.features is None else {"features": self.features.identity}
        return {name: judge["weights"] for name, judge in known.items() if "weights" in judge}

    def _score(self, job: Job[None], run: Path, steps: int) -> dict[str, Any]:
        config, last = self.config, steps == self.config.eval_steps[-1]
        pairs = self.pairs if last else self.pairs[: config.curve_pairs]
        drawing = Drawing(
            config.samples if last else 1,
            config.batch_size,
            config.num_inference_steps,
            config.guidance_scale,
            seed=config.seed,
        )
        folder = config.output_dir / "images" / job.key / f"{steps:06d}"
        marker = folder / "identity.txt"
        if folder.exists() and not marker.is_file() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds what no study drew: move it, or choose another output_dir")
        identity = self._mark(job)
        if folder.exists() and not (marker.is_file() and read_bytes(marker) == identity.encode()):
            shutil.rmtree(folder)  # drawn with other settings
        write_text(marker, identity)
        pipe = load_run(run, self.device)
        samples = draw_samples(pipe, read_run(run), pairs, folder, drawing)
        paths = [[folder / sample.file_name for sample in of_pair] for of_pair in samples]
        clip, features = (self.clip, self.features) if last else (None, None)
        scores: ControlScores = score_control(pairs, paths, self.task, clip, features, originals=last)
        known = read_provenance(run)
        return {
            "scores": scores.scores,
            "originals": scores.originals,
            "classes": scores.classes,
            "judges": scores.judges,
            "choices": scores.choices,
            "warnings": scores.warnings,
            "pairs": scores.pairs,
            "samples_per_pair": scores.samples_per_pair,
            "folder": str(folder.relative_to(config.output_dir)),
            "trained_parameters": known["trained_parameters"],
        }

    def _identity(self, job: Job[None]) -> str:
        """Stands for the settings that a result depends on; :meth:`check` compares base and judges by themselves."""
        drawn = ("pairs", "curve_pairs", "samples", "num_inference_steps", "guidance_scale", "seed", "eval_steps")
        judged = ("data", "segmenter", "label_offset", "ignore_index", "clip", "fid_features")
        settings = {name: getattr(self.config, name) for name in (*drawn, *judged)} | {"training": job.settings}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def _mark(self, job: Job[None]) -> str:
        """Stands for all that a training and its pictures depend on."""
        return f"{self._identity(job)} {self.base_of(job)}"
