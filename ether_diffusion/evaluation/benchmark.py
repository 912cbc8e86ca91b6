"""The jobs of a benchmark: train, draw, score. What is done stays done; what fails is told and the rest goes on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from tqdm import tqdm

from ether_diffusion.checkpoint import first_line
from ether_diffusion.data.images import list_images, load_image
from ether_diffusion.data.randomness import generator
from ether_diffusion.evaluation.images import draw, load_pipeline, load_run
from ether_diffusion.evaluation.jobs import BASE, BenchmarkConfig, Job, all_jobs
from ether_diffusion.evaluation.protocols import Subject, load_protocol
from ether_diffusion.evaluation.summary import write_summary
from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.metrics.backbones import Clip, Dino
from ether_diffusion.metrics.fidelity import without_token
from ether_diffusion.training import dreambooth
from ether_diffusion.training.cli import parse_config

logger = logging.getLogger(__name__)

DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


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
class Judges:
    """The models that score, loaded once.

    Attributes:
        dino: for DINO.
        clip: for CLIP-I and CLIP-T.
    """

    dino: Dino
    clip: Clip

    @property
    def identity(self) -> dict[str, str]:
        """What stands beside every score: the models, what they are by their weights, and the libraries."""
        libraries = {name: version(name) for name in LIBRARIES}
        return {"dino": self.dino.identity, "clip": self.clip.identity, **libraries}


def run_jobs(jobs: list[Job], config: BenchmarkConfig, judges: Judges, device: torch.device) -> dict[str, str]:
    """Do the jobs that are not done; return the errors of those that failed, by key."""
    failed: dict[str, str] = {}
    for job in (progress := tqdm(jobs, unit="job")):
        progress.set_postfix_str(job.key)
        try:
            run_job(job, config, judges, device)
        except Exception as error:  # one failure must not cost the others
            logger.error("%s failed: %s", job.key, first_line(error))
            logger.debug("traceback", exc_info=True)
            failed[job.key] = f"{type(error).__name__}: {error}"
            write_text(config.output_dir / "results" / f"{job.key}.error.txt", failed[job.key])
    return failed


def run_job(job: Job, config: BenchmarkConfig, judges: Judges, device: torch.device) -> None:
    """Train, draw and score one subject, each unless it is there; the scores are written last.

    Raises:
        ValueError: scores or images are there that were made with other settings.
    """
    result = config.output_dir / "results" / f"{job.key}.json"
    if result.is_file():
        _check_settings(result, job, config)
        return
    images, run = config.output_dir / "images" / job.key, config.output_dir / "runs" / job.key
    facts: dict[str, Any] = {"settings_hash": job.hash(config)}
    if images.is_dir():
        _check_settings(images / "facts.json", job, config)
    else:
        if job.arm != BASE:
            facts |= _train(job, config, run)
        pipe = load_pipeline(config.base_model, device) if job.arm == BASE else load_run(run, device)
        with atomic_path(images) as temporary:
            temporary.mkdir()
            _draw_all(pipe, job, config, temporary)
            write_text(temporary / "facts.json", json.dumps(facts))
    rows = score_images(images, job.subject, config, judges)
    record = {
        "arm": job.arm,
        "learning_rate": job.settings.get("learning_rate"),
        "subject": job.subject.name,
        "seed": job.seed,
        "judges": judges.identity,
        **json.loads((images / "facts.json").read_text()),
        "images": rows,
    }
    write_text(result, json.dumps(record))
    result.with_name(f"{result.stem}.error.txt").unlink(missing_ok=True)
    if not config.keep_runs and run.exists():
        shutil.rmtree(run)


def score_images(images: Path, subject: Subject, config: BenchmarkConfig, judges: Judges) -> list[dict[str, Any]]:
    """One row per image: prompt, DINO and CLIP-I as means over the references, CLIP-T without and with the token.

    Every image goes through each judge once.
    """
    prompts = [prompt for prompt in subject.prompts for _ in range(config.images_per_prompt)]
    names = [f"{number:04d}.png" for number in range(len(prompts))]
    pictures = [load_image(images / name) for name in names]
    references = [load_image(path) for path in list_images(subject.references)]
    by_dino = judges.dino.image_features(pictures) @ judges.dino.image_features(references).T
    seen = judges.clip.image_features(pictures)
    by_clip = seen @ judges.clip.image_features(references).T
    written = [prompt.format(token=config.token) for prompt in prompts]
    bare = [without_token(prompt, config.token) for prompt in written]
    by_text = {"clip_t": bare, "clip_t_written": written}
    said = {name: (seen * judges.clip.text_features(texts)).sum(-1) for name, texts in by_text.items()}
    return [
        {
            "file": name,
            "prompt": written[row],
            "dino": by_dino[row].mean().item(),
            "clip_i": by_clip[row].mean().item(),
            **{metric: values[row].item() for metric, values in said.items()},
        }
        for row, name in enumerate(names)
    ]


def _check_settings(path: Path, job: Job, config: BenchmarkConfig) -> None:
    if (made_with := json.loads(path.read_text())["settings_hash"]) != job.hash(config):
        raise ValueError(f"{path} was made with other settings ({made_with}): remove it, or choose another output_dir")


def _train(job: Job, config: BenchmarkConfig, run: Path) -> dict[str, Any]:
    AcceleratorState._reset_state(True)  # of the run before
    GradientState._reset_state()
    dreambooth.run(job.training_config(config, run))
    known = json.loads((run / "provenance.json").read_text())
    return {name: known[name] for name in ("trained_parameters", "seconds", "base_hash")}


def _draw_all(pipe: Any, job: Job, config: BenchmarkConfig, folder: Path) -> None:
    asked = [
        prompt.format(token=config.token) for prompt in job.subject.prompts for _ in range(config.images_per_prompt)
    ]
    seeds = [generator(job.seed, "image", number).initial_seed() for number in range(len(asked))]
    drawn = draw(pipe, asked, seeds, config.batch_size, config.num_inference_steps, config.guidance_scale)
    for number, picture in enumerate(tqdm(drawn, total=len(asked), desc="draw", leave=False)):
        picture.save(folder / f"{number:04d}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: this process's share of the jobs, then the summary of all that are done.

    Raises:
        SystemExit: a setting is impossible, or jobs failed.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    index, count = take_share()
    config = parse_config(BenchmarkConfig, arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        subjects = load_protocol(config.protocol, config.data_dir, config.output_dir / "subjects", config.subjects)
        jobs = all_jobs(config, subjects)
        for job in jobs:
            job.training_config(config, config.output_dir)  # a mistake in the last arm shows before the first one runs
        judges = Judges(Dino(config.dino, device), Clip(config.clip, device))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    failed = run_jobs(jobs[index::count], config, judges, device)
    print(write_summary(config.output_dir, jobs))
    for key, reason in failed.items():
        print(f"{key}: {reason}", file=sys.stderr)
    if failed:
        raise SystemExit(f"{len(failed)} jobs failed; the same command tries them again")
