"""Table 3 and Fig. 6: control accuracy of several methods at several learning rates, while they train.

Every job trains one arm at one rate with one seed, and stops at each of ``eval_steps`` to draw and score; a resumed
training is the uninterrupted one bit for bit, so the stops change nothing. What is done stays done.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from tqdm import tqdm

from ether_diffusion.data.pairs import read_listing
from ether_diffusion.evaluation.controls.differences import write_differences
from ether_diffusion.evaluation.controls.findings import PAIRS, RESULTS, read_findings, write_outline
from ether_diffusion.evaluation.controls.jobs import ControlStudyConfig, Job, all_jobs
from ether_diffusion.evaluation.controls.tables import write_study
from ether_diffusion.evaluation.subjects.benchmark import take_share
from ether_diffusion.files import write_text
from ether_diffusion.metrics.backbones import Backbone, load_clip
from ether_diffusion.metrics.control import ControlScores, score_control
from ether_diffusion.metrics.control_tasks import ControlTask, Pair, Segmentation
from ether_diffusion.metrics.distribution import load_feature_model
from ether_diffusion.metrics.segmentation import Segmenter
from ether_diffusion.pipelines.file import first_line
from ether_diffusion.playground.pairs import write_pairs
from ether_diffusion.runs.drawing import Drawing, draw_samples, load_run
from ether_diffusion.runs.folder import git_revision, list_checkpoints, read_provenance
from ether_diffusion.runs.record import read_run
from ether_diffusion.training import control
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.loop import TrainingDivergedError, TrainingInterruptedError

logger = logging.getLogger(__name__)


@dataclass
class Study:
    """Where jobs are done.

    Attributes:
        config: the study's settings.
        device: where to draw and judge.
    """

    config: ControlStudyConfig
    device: torch.device

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
        entries = read_listing(folder)[: self.config.pairs]
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

    def run_job(self, job: Job) -> None:
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
                known = json.loads(result.read_text())
                if "diverged" in known:
                    break
                continue
            facts: dict[str, Any] = {"arm": job.arm, "rate": job.rate, "seed": job.seed, "steps": steps}
            facts |= {"identity": identity, "settings": job.settings, "git_revision": git_revision()}
            try:
                self._train(job, run, steps, identity)
            except TrainingDivergedError as error:
                write_text(result, json.dumps(facts | {"diverged": first_line(error)}, default=str))
                break
            write_text(result, json.dumps(facts | self._score(job, run, steps), default=str))
        if not self.config.keep_runs and run.exists():
            shutil.rmtree(run)
            with suppress(OSError):  # another seed is there
                run.parent.rmdir()

    def check(self, job: Job) -> None:
        """Raise ValueError if there is a result of the job that was made with other settings."""
        for result in (self.config.output_dir / RESULTS / job.key).glob("*.json"):
            if json.loads(result.read_text())["identity"] != self._identity(job):
                raise ValueError(f"{result} was made with other settings: remove it, or choose another output_dir")

    def _train(self, job: Job, run: Path, steps: int, identity: str) -> None:
        config, marker = job.config(run, steps), run / "job.txt"
        same = marker.is_file() and marker.read_text() == identity
        if same and list_checkpoints(run / "checkpoints"):
            config.resume = "latest"
        known = read_provenance(run)
        if same and known.get("status") == "finished" and known.get("step") == steps:
            return
        config.overwrite = config.resume is None
        write_text(marker, identity)
        AcceleratorState._reset_state(True)  # of the run before
        GradientState._reset_state()
        control.run(config)

    def _score(self, job: Job, run: Path, steps: int) -> dict[str, Any]:
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
        marker, identity = folder / "identity.txt", self._identity(job)
        if folder.exists() and not (marker.is_file() and marker.read_text() == identity):
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
            "base_hash": known["base_hash"],
        }

    def _identity(self, job: Job) -> str:
        """Stands for all that a result depends on but for the base's weights."""
        drawn = ("pairs", "curve_pairs", "samples", "num_inference_steps", "guidance_scale", "seed", "eval_steps")
        judged = ("data", "segmenter", "label_offset", "ignore_index", "clip", "fid_features")
        settings = {name: getattr(self.config, name) for name in (*drawn, *judged)} | {"training": job.settings}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: this process's share of the jobs, then table and figure of all that are done.

    Raises:
        SystemExit: a setting is impossible, a judge is missing, a signal came, or jobs failed.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    config = parse_config(ControlStudyConfig, arguments)
    index, count = take_share()
    study = Study(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        jobs = all_jobs(config)
        for job in jobs:
            job.config(config.output_dir, config.eval_steps[-1])  # a mistake shows before the first one runs
            study.check(job)
        _ = study.pairs, study.task, study.clip, study.features
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    write_outline(config.output_dir, [job.key for job in jobs], config.eval_steps[-1], config.data)
    failed: dict[str, str] = {}
    for job in (progress := tqdm(jobs[index::count], unit="job")):
        progress.set_postfix_str(job.key)
        try:
            study.run_job(job)
        except TrainingInterruptedError as error:
            print("stopped; the same command goes on from here", file=sys.stderr)
            raise SystemExit(128 + error.signal) from None
        except Exception as error:  # one failure must not cost the others
            logger.error("%s failed: %s", job.key, first_line(error))
            logger.debug("traceback", exc_info=True)
            failed[job.key] = f"{type(error).__name__}: {error}"
    print(write_study(config.output_dir))
    if config.compare_with and len(read_findings(config.output_dir).best) > 1:
        print(write_differences(config.output_dir, config.compare_with))
    for key, reason in failed.items():
        print(f"{key}: {reason}", file=sys.stderr)
    if failed and count == 1:
        raise SystemExit(1)
