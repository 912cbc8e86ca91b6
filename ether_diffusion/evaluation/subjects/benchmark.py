"""The jobs of a benchmark: train, draw, score. What is done stays done; what fails is told and the rest goes on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from tqdm import tqdm

from ether_diffusion import pipelines
from ether_diffusion.evaluation.subjects.anchors import ANSWERS
from ether_diffusion.evaluation.subjects.jobs import BenchmarkConfig, Job, all_jobs
from ether_diffusion.evaluation.subjects.protocols import load_protocol
from ether_diffusion.evaluation.tables import write_summary
from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.images import list_images
from ether_diffusion.metrics.distances import components, mean_distances
from ether_diffusion.metrics.judges import load_judges
from ether_diffusion.metrics.scoring import Judges, References, score_class_images, score_drift, score_images
from ether_diffusion.pipelines.file import first_line
from ether_diffusion.pipelines.fingerprint import base_hash
from ether_diffusion.registry import METHODS
from ether_diffusion.runs.drawing import Asked, draw, load_pipeline, load_run
from ether_diffusion.runs.folder import git_revision, list_checkpoints, read_provenance
from ether_diffusion.training import dreambooth
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.loop import TrainingDivergedError, TrainingInterruptedError

logger = logging.getLogger(__name__)

DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SCORES_VERSION = 2
"""Raised when the scores of an image change, so that images that were scored before are scored again."""
JOBS = "jobs.json"
"""In the output folder: the keys of all jobs, so that a reader sees what is missing."""


def take_share(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which of how many processes this one is, as ``accelerate launch`` or torchrun say.

    The processes of a benchmark share jobs, not gradients: each is to train alone, so what would join them is taken
    out of this process's environment, and of several GPUs each sees its own.
    """
    index, count = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if count > 1:
        local = int(environment.get("LOCAL_RANK", 0))
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local % len(visible)] if visible else str(local)
    for name in DISTRIBUTED:
        os.environ.pop(name, None)
    return index, count


@dataclass
class Bench:
    """Where jobs are done.

    Attributes:
        config: the benchmark's settings.
        judges: who scores.
        device: where to draw.
    """

    config: BenchmarkConfig
    judges: Judges
    device: torch.device
    _seen: dict[str, References] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def base(self) -> DiffusionPipeline:
        """The base model itself, loaded when it is first needed."""
        return load_pipeline(self.config.base_model, self.device)

    @cached_property
    def base_hash(self) -> str | None:
        """The identity of the base's UNet."""
        return base_hash(self.base.unet)

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Do the jobs that are not done; return the errors of those that failed, by key.

        Raises:
            TrainingInterruptedError: Ctrl-C or SIGTERM; the same jobs go on where they were.
        """
        failed: dict[str, str] = {}
        for job in (progress := tqdm(jobs, unit="job")):
            progress.set_postfix_str(job.key)
            try:
                self.run_job(job)
            except TrainingInterruptedError:
                raise
            except Exception as error:  # one failure must not cost the others
                logger.error("%s failed: %s", job.key, first_line(error))
                logger.debug("traceback", exc_info=True)
                failed[job.key] = f"{type(error).__name__}: {error}"
                write_text(self.config.output_dir / "results" / f"{job.key}.error.txt", failed[job.key])
        return failed

    def run_job(self, job: Job) -> None:
        """Train, draw and score one subject, each unless it is there; the scores are written last.

        Images that other judges scored are scored anew. A training that diverged is a result, too: without images.

        Raises:
            ValueError: scores or images are there that were made with other settings or from another base.
        """
        result, run = self._path("results", job, ".json"), self._path("runs", job)
        if result.is_file():
            known = json.loads(result.read_text())
            self._check(known, result, job)
            if known.get("diverged") or known["judged_by"] == self._judged_by(job):
                return
        facts = {
            "arm": job.arm,
            "learning_rate": job.settings.get("learning_rate"),
            "subject": job.subject.name,
            "seed": job.seed,
            "settings": {name: value for name, value in job.settings.items() if value is not None},
            "judges": self.judges.identity,
            "judged_by": self._judged_by(job),
            "git_revision": git_revision(),
        }
        try:
            images = self._images(job)
        except TrainingDivergedError as error:
            facts |= self._identity(job) | {"diverged": first_line(error), "images": []}
        else:
            facts |= json.loads((images / "facts.json").read_text()) | self._score(job, images)
        result.with_name(f"{result.stem}.error.txt").unlink(missing_ok=True)
        write_text(result, json.dumps(facts, default=str))
        if not self.config.keep_runs and run.exists():
            shutil.rmtree(run)

    def _judged_by(self, job: Job) -> dict[str, Any]:
        """What the scores of its images depend on: judges, truths, and the set of scores that there is."""
        return {**self.judges.weights, "truths": job.subject.truths_fingerprint, "scores": SCORES_VERSION}

    def _references(self, job: Job) -> References:
        """The subject's references, seen by the judges once and not by each of its jobs."""
        if job.subject.name not in self._seen:
            references = list_images(job.subject.references)
            self._seen = {job.subject.name: References(references, self.judges, job.truths(self.config))}
        return self._seen[job.subject.name]

    def _path(self, kind: str, job: Job, suffix: str = "") -> Path:
        return self.config.output_dir / kind / f"{job.key}{suffix}"

    def _identity(self, job: Job) -> dict[str, Any]:
        return {"settings_hash": job.hash(self.config), "base_hash": self.base_hash}

    def _images(self, job: Job) -> Path:
        """The folder of the job's images, drawn with what it trains if it is not there; whole or not at all."""
        folder, run = self._path("images", job), self._path("runs", job)
        if folder.is_dir():
            self._check(json.loads((folder / "facts.json").read_text()), folder / "facts.json", job)
            return folder
        facts = self._identity(job)
        pipe = self.base
        if job.trains:
            facts |= self._train(job, run)
            pipe = load_run(run, self.device)
            facts["distances"] = mean_distances(components(pipe), components(self.base), job.method)
            if METHODS[job.method].is_own:
                pipelines.fuse(pipe)  # to draw as fast as the base does
        with atomic_path(folder) as temporary:
            for name, asked in job.asked(self.config).items():
                (temporary / name).mkdir(parents=True)
                self._draw(pipe, asked, temporary / name, job)
            write_text(temporary / "facts.json", json.dumps(facts))
        return folder

    def _train(self, job: Job, run: Path) -> dict[str, Any]:
        """Train, or go on from the last checkpoint of the same training, unless it is finished."""
        config, marker = job.training_config(self.config, run), run / "job.txt"
        mark = "".join(map(str, self._identity(job).values()))
        known = read_provenance(run)
        if known and marker.is_file() and marker.read_text() == mark:
            if list_checkpoints(run / "checkpoints"):
                config.resume = "latest"
        else:
            known = {}
        if known.get("status") != "finished":
            config.overwrite = config.resume is None
            write_text(marker, mark)
            AcceleratorState._reset_state(True)  # of the run before
            GradientState._reset_state()
            dreambooth.run(config)
            known = read_provenance(run)
        return {name: known[name] for name in ("trained_parameters", "seconds")}

    def _draw(self, pipe: DiffusionPipeline, asked: Asked, folder: Path, job: Job) -> None:
        config = self.config
        if job.arm in ANSWERS:
            drawn = ANSWERS[job.arm](asked, job.subject)
        else:
            drawn = draw(pipe, asked, config.batch_size, config.num_inference_steps, config.guidance_scale)
        for name, picture in zip(
            asked.names, tqdm(drawn, total=len(asked.names), desc="draw", leave=False), strict=True
        ):
            picture.save(folder / name)

    def _score(self, job: Job, images: Path) -> dict[str, Any]:
        """What the judges say, by kind of image: rows with the file and the prompt of each."""
        asked = job.asked(self.config)
        paths = {kind: [images / kind / name for name in each.names] for kind, each in asked.items()}
        references = self._references(job)
        scored = score_images(paths["images"], asked["images"].prompts, references, self.judges, self.config.token)
        rows = {"images": scored.images}
        if paths["class_images"]:
            rows["class_images"] = score_class_images(paths["class_images"], references, self.judges)
        if paths["unrelated"]:
            before = self._images(job.of_base) / "unrelated"
            base = [before / name for name in asked["unrelated"].names]
            rows["unrelated"] = score_drift(paths["unrelated"], base, self.judges)
        return {
            "folder": str((images / "images").relative_to(self.config.output_dir)),
            "references": [str(path) for path in references.paths],
            "real": references.among(self.judges),
            "prompts": scored.prompts,
            **{
                kind: [
                    {"file": name, "prompt": prompt} | row
                    for name, prompt, row in zip(each.names, each.prompts, rows.get(kind, []), strict=True)
                ]
                for kind, each in asked.items()
            },
        }

    def _check(self, known: Mapping[str, Any], path: Path, job: Job) -> None:
        """Refuse what is there if it was made with other settings or photos, or from another base."""
        what = {"settings_hash": "other settings or photos", "base_hash": "another base"}
        if changed := [what[name] for name, value in self._identity(job).items() if known[name] != value]:
            reasons = " and ".join(changed)
            raise ValueError(f"{path} was made with {reasons}: remove it, or choose another output_dir")


def run_benchmark(config: BenchmarkConfig) -> bool:
    """Do this process's share of the jobs, write the summary of all that are done, and print it.

    Returns:
        Whether all jobs of all processes have a result; in one of several processes they may not yet.

    Raises:
        SystemExit: a setting is impossible, a judge is missing, a signal came, or, in a single process, jobs failed.
    """
    index, count = take_share()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        subjects = load_protocol(config.protocol, config.data_dir, config.output_dir / "subjects", config.subjects)
        jobs = all_jobs(config, subjects)
        for job in (job for job in jobs if job.trains):
            job.training_config(config, config.output_dir)  # a mistake in the last arm shows before the first one runs
        judges = load_judges(config.dino, config.clip, config.lpips, config.lpips_net, config.lpips_size, device)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    write_text(config.output_dir / JOBS, json.dumps([job.key for job in jobs], indent=1))
    write_text(config.output_dir / "config.yaml", yaml.safe_dump(json.loads(json.dumps(asdict(config), default=str))))
    try:
        failed = Bench(config, judges, device).run(jobs[index::count])
    except TrainingInterruptedError as error:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + error.signal) from None
    text, missing = write_summary(config.output_dir, jobs)
    print(text)
    for key, reason in failed.items():
        print(f"{key}: {reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} jobs failed; the same command tries them again", file=sys.stderr)
        if count == 1:  # one of several processes would take the others with it
            raise SystemExit(1)
    return not missing


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: this process's share of the jobs, then the summary of all that are done.

    Raises:
        SystemExit: a setting is impossible, or jobs failed.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    run_benchmark(parse_config(BenchmarkConfig, arguments))
