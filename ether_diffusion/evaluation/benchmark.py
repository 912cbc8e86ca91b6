"""The jobs of a benchmark: train, draw, score. What is done stays done; what fails is told and the rest goes on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from tqdm import tqdm

from ether_diffusion import pipelines
from ether_diffusion.checkpoint import first_line
from ether_diffusion.data.images import list_images
from ether_diffusion.evaluation.distances import mean_distances
from ether_diffusion.evaluation.images import Asked, draw, load_pipeline, load_run
from ether_diffusion.evaluation.jobs import BASE, BenchmarkConfig, Job, all_jobs
from ether_diffusion.evaluation.protocols import load_protocol
from ether_diffusion.evaluation.summary import write_summary
from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.fingerprint import base_hash
from ether_diffusion.metrics.judges import load_judges
from ether_diffusion.metrics.scoring import Judges, References, score_class_images, score_drift, score_images
from ether_diffusion.training import dreambooth
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.config import ETHER_METHODS

logger = logging.getLogger(__name__)

DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def take_share(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which of how many processes this one is, as ``accelerate launch`` or torchrun say.

    The processes of a benchmark share jobs, not gradients: each is to train alone, so what would join them is taken
    out of this process's environment, and of several GPUs each sees its own.
    """
    index, count = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if count > 1 and "CUDA_VISIBLE_DEVICES" not in environment:
        os.environ["CUDA_VISIBLE_DEVICES"] = environment.get("LOCAL_RANK", "0")
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

    @cached_property
    def base(self) -> DiffusionPipeline:
        """The base model itself, loaded when it is first needed."""
        return load_pipeline(self.config.base_model, self.device)

    @cached_property
    def base_hash(self) -> str | None:
        """The identity of the base's UNet."""
        return base_hash(self.base.unet)

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Do the jobs that are not done; return the errors of those that failed, by key."""
        failed: dict[str, str] = {}
        for job in (progress := tqdm(jobs, unit="job")):
            progress.set_postfix_str(job.key)
            try:
                self.run_job(job)
            except Exception as error:  # one failure must not cost the others
                logger.error("%s failed: %s", job.key, first_line(error))
                logger.debug("traceback", exc_info=True)
                failed[job.key] = f"{type(error).__name__}: {error}"
                write_text(self.config.output_dir / "results" / f"{job.key}.error.txt", failed[job.key])
        return failed

    def run_job(self, job: Job) -> None:
        """Train, draw and score one subject, each unless it is there; the scores are written last.

        Raises:
            ValueError: scores or images are there that were made with other settings.
        """
        result = self.config.output_dir / "results" / f"{job.key}.json"
        if result.is_file():
            self._check(result, job)
            return
        images, run = self._images(job), self.config.output_dir / "runs" / job.key
        record = {
            "arm": job.arm,
            "learning_rate": job.settings.get("learning_rate"),
            "subject": job.subject.name,
            "seed": job.seed,
            "judges": self.judges.identity,
            **json.loads((images / "facts.json").read_text()),
            **self._score(job, images),
        }
        write_text(result, json.dumps(record))
        result.with_name(f"{result.stem}.error.txt").unlink(missing_ok=True)
        if not self.config.keep_runs and run.exists():
            shutil.rmtree(run)

    def _images(self, job: Job) -> Path:
        """The folder of the job's images, drawn with what it trains if it is not there; whole or not at all."""
        folder, run = self.config.output_dir / "images" / job.key, self.config.output_dir / "runs" / job.key
        if folder.is_dir():
            self._check(folder / "facts.json", job)
            return folder
        facts: dict[str, Any] = {"settings_hash": job.hash(self.config), "base_hash": self.base_hash}
        pipe = self.base
        if job.arm != BASE:
            facts |= self._train(job, run)
            pipe = load_run(run, self.device)
            facts["distances"] = mean_distances(pipe.unet, self.base.unet, job.method)
            if job.method in ETHER_METHODS:
                pipelines.fuse(pipe)  # to draw as fast as the base does
        with atomic_path(folder) as temporary:
            for name, asked in job.asked(self.config).items():
                (temporary / name).mkdir(parents=True)
                self._draw(pipe, asked, temporary / name)
            write_text(temporary / "facts.json", json.dumps(facts))
        return folder

    def _train(self, job: Job, run: Path) -> dict[str, Any]:
        AcceleratorState._reset_state(True)  # of the run before
        GradientState._reset_state()
        dreambooth.run(job.training_config(self.config, run))
        known = json.loads((run / "provenance.json").read_text())
        return {name: known[name] for name in ("trained_parameters", "seconds")}

    def _draw(self, pipe: DiffusionPipeline, asked: Asked, folder: Path) -> None:
        config = self.config
        drawn = draw(pipe, asked, config.batch_size, config.num_inference_steps, config.guidance_scale)
        for name, picture in zip(
            asked.names, tqdm(drawn, total=len(asked.names), desc="draw", leave=False), strict=True
        ):
            picture.save(folder / name)

    def _score(self, job: Job, images: Path) -> dict[str, Any]:
        """What the judges say, by kind of image: rows with the file and the prompt of each."""
        asked = job.asked(self.config)
        paths = {kind: [images / kind / name for name in each.names] for kind, each in asked.items()}
        references = References(list_images(job.subject.references), self.judges)
        scored = score_images(paths["images"], asked["images"].prompts, references, self.judges, self.config.token)
        rows = {"images": scored.images, "prompts": scored.prompts}
        if paths["class_images"]:
            rows["class_images"] = score_class_images(paths["class_images"], references, self.judges)
        if paths["unrelated"]:
            before = self._images(job.of_base) / "unrelated"
            rows["unrelated"] = score_drift(
                paths["unrelated"], [before / name for name in asked["unrelated"].names], self.judges
            )
        named = {
            kind: [
                {"file": name, "prompt": prompt} | row
                for name, prompt, row in zip(each.names, each.prompts, rows.get(kind, []), strict=True)
            ]
            for kind, each in asked.items()
        }
        return {
            "references": [path.name for path in references.paths],
            "real": references.among(self.judges),
            "prompts": rows["prompts"],
            **named,
        }

    def _check(self, path: Path, job: Job) -> None:
        """Refuse what is there if it was made with other settings, from another base, or scored by other judges."""
        known = json.loads(path.read_text())
        judges = {name: self.judges.identity.get(name) for name in known.get("judges", {}) if name != "libraries"}
        now = {"settings_hash": job.hash(self.config), "base_hash": self.base_hash, "judges": judges}
        before = {**known, "judges": {name: known["judges"][name] for name in judges}}
        if changed := [name for name, value in now.items() if before[name] != value]:
            what = {"settings_hash": "other settings", "base_hash": "another base", "judges": "other judges"}
            reasons = " and ".join(what[name] for name in changed)
            raise ValueError(f"{path} was made with {reasons}: remove it, or choose another output_dir")


def run_benchmark(config: BenchmarkConfig) -> list[Job]:
    """Do this process's share of the jobs, write the summary of all that are done, print it; return all the jobs.

    Raises:
        SystemExit: a setting is impossible, a judge is missing, or jobs failed.
    """
    index, count = take_share()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        subjects = load_protocol(config.protocol, config.data_dir, config.output_dir / "subjects", config.subjects)
        jobs = all_jobs(config, subjects)
        for job in jobs:
            job.training_config(config, config.output_dir)  # a mistake in the last arm shows before the first one runs
        judges = load_judges(config.dino, config.clip, config.lpips, config.lpips_net, config.lpips_size, device=device)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    failed = Bench(config, judges, device).run(jobs[index::count])
    print(write_summary(config.output_dir, jobs))
    for key, reason in failed.items():
        print(f"{key}: {reason}", file=sys.stderr)
    if failed:
        raise SystemExit(f"{len(failed)} jobs failed; the same command tries them again")
    return jobs


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: this process's share of the jobs, then the summary of all that are done.

    Raises:
        SystemExit: a setting is impossible, or jobs failed.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    run_benchmark(parse_config(BenchmarkConfig, arguments))
