"""Table 3 and Fig. 6: control accuracy of several methods at several learning rates, while they train.

Every job trains one arm at one rate and stops at each of ``eval_steps`` to draw and score; a resumed training is the
uninterrupted one bit for bit, so the stops change nothing. What is done stays done.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from tqdm import tqdm

from ether_diffusion.checkpoint import first_line
from ether_diffusion.data.pairs import read_listing
from ether_diffusion.evaluation.benchmark import take_share
from ether_diffusion.evaluation.control_images import Drawing, draw_samples
from ether_diffusion.evaluation.control_intervals import write_differences
from ether_diffusion.evaluation.control_tables import best_of_arms, read_results, write_study
from ether_diffusion.evaluation.images import load_run
from ether_diffusion.files import write_text
from ether_diffusion.metrics.backbones import Backbone, load_clip
from ether_diffusion.metrics.control import ControlScores, score_control
from ether_diffusion.metrics.control_tasks import ControlTask, Pair, Segmentation
from ether_diffusion.metrics.distribution import load_feature_model
from ether_diffusion.metrics.segmentation import Segmenter
from ether_diffusion.playground import NAME as PLAYGROUND
from ether_diffusion.playground.pairs import write_pairs
from ether_diffusion.training import control
from ether_diffusion.training.checkpoints import list_checkpoints
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.loop import TrainingDivergedError, TrainingInterruptedError
from ether_diffusion.training.run_folder import git_revision, read_provenance
from ether_diffusion.training.run_record import read_run

logger = logging.getLogger(__name__)

VARIED = ("learning_rate", "encoder_lr")
"""Settings of an arm that may be a list, which makes one job of each value."""
STEADY = ("constant", "constant_with_warmup", "piecewise_constant")
"""Schedules that do not depend on how long the training will be."""
OWN = ("output_dir", "overwrite", "resume", "max_train_steps")
"""Settings of the training that the study sets itself."""


@dataclass
class ControlStudyConfig:
    """Train control with every arm, and score it on the way.

    Attributes:
        output_dir: where runs, pictures and results go; what is there already is not done again.
        arms: from a name to the settings of train_controlnet.py that make it. One of learning_rate and encoder_lr may
            be a list: a job for each value.
        training: settings of train_controlnet.py that all arms share.
        eval_steps: after how many steps to draw and score; the last is the length of the training.
        data: folder of pairs to evaluate on, semantic maps among them; drawn for the playground.
        pairs: how many pairs of the data to use at the last step.
        curve_pairs: how many at the steps before it, one sample each.
        samples: for each pair at the last step.
        batch_size: pictures drawn at a time.
        num_inference_steps: denoising steps of a picture.
        guidance_scale: classifier-free guidance of a picture.
        seed: of the pictures' noise.
        segmenter: judge of the maps: Hub id, folder or playground.
        label_offset: the maps' id of the segmenter's class 0; as its image processor says where it is not given.
        ignore_index: id that is left out of the scores.
        clip: judge of CLIP-T; without it there is none.
        fid_features: of FID and KID: inception, dino:NAME, clip:NAME or playground; without them there is neither.
        compare_with: arms that every other is held against, with 95% intervals of the difference in mIoU.
        keep_runs: keep what was trained.
    """

    output_dir: Path
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    eval_steps: list[int] = field(default_factory=lambda: [200, 400, 800])
    data: Path | None = None
    pairs: int = 96
    curve_pairs: int = 48
    samples: int = 4
    batch_size: int = 16
    num_inference_steps: int = 50
    guidance_scale: float = 9.0
    seed: int = 0
    segmenter: str = PLAYGROUND
    label_offset: int | None = None
    ignore_index: int | None = 255
    clip: str | None = None
    fid_features: str | None = None
    compare_with: list[str] = field(default_factory=list)
    keep_runs: bool = False

    def __post_init__(self) -> None:
        self.output_dir = Path(self.output_dir)
        self.data = None if self.data is None else Path(self.data)
        self.eval_steps = sorted(set(self.eval_steps))
        if not self.arms:
            raise ValueError("arms is empty: name at least one")
        if not self.eval_steps or self.eval_steps[0] < 1:
            raise ValueError("eval_steps must be steps of the training, the last one its length")
        if unknown := [arm for arm in self.compare_with if arm not in self.arms]:
            raise ValueError(f"compare_with: there is no arm {unknown[0]!r}; there are: {', '.join(self.arms)}")
        if self.data is None and self.training.get("train_data_dir") != PLAYGROUND:
            raise ValueError("data is missing: name the folder of pairs to evaluate on")
        for where, settings in {"training": self.training, **self.arms}.items():
            if taken := [name for name in OWN if name in settings]:
                raise ValueError(f"{where}: {', '.join(taken)} is set by the study itself; leave it out")


@dataclass(frozen=True)
class Job:
    """One arm at one rate.

    Attributes:
        arm: its name.
        settings: of train_controlnet.py.
        rate: the value of the setting that is varied, None where none is.
    """

    arm: str
    settings: dict[str, Any]
    rate: float | None

    @property
    def key(self) -> str:
        """Its folder."""
        return self.arm if self.rate is None else f"{self.arm}@{self.rate:g}"

    def config(self, folder: Path, steps: int) -> ControlConfig:
        """The settings of its training, which draws no samples of its own.

        Raises:
            ValueError: a setting is not one of train_controlnet.py's, or impossible.
        """
        own = {"output_dir": folder, "max_train_steps": steps, "num_validation_images": 0}
        frequency = {"checkpointing_steps": steps, "checkpoints_total_limit": 1, "validation_steps": steps}
        try:
            config = ControlConfig(**frequency | self.settings | own)
        except TypeError as error:
            raise ValueError(f"arm {self.arm}: {error}") from None
        if config.lr_scheduler not in STEADY:
            raise ValueError(
                f"arm {self.arm}: lr_scheduler={config.lr_scheduler} depends on the training's length, which grows "
                f"from one evaluation to the next; use {', '.join(STEADY)}"
            )
        return config


def all_jobs(config: ControlStudyConfig) -> list[Job]:
    """Every arm at every rate, the arms by turns, so that a study cut short has some of each.

    Raises:
        ValueError: two settings of an arm are lists, or a rate is no number.
    """
    jobs: list[list[Job]] = []
    for arm, own in config.arms.items():
        lists = [name for name in VARIED if isinstance(own.get(name), list)]
        if len(lists) > 1:
            raise ValueError(f"arm {arm}: only one of {', '.join(lists)} may be a list")
        settings = {**config.training, **own}
        try:
            numbers = {name: settings[name] for name in VARIED if settings.get(name) is not None}
            settings |= {name: float(value) for name, value in numbers.items() if not isinstance(value, list)}
            rates = [float(value) for value in own[lists[0]]] if lists else []
        except (TypeError, ValueError) as error:
            raise ValueError(f"arm {arm}: a learning rate is no number: {error}") from None
        jobs.append([Job(arm, {**settings, lists[0]: rate}, rate) for rate in rates] or [Job(arm, settings, None)])
    longest = max(map(len, jobs))
    return [of_arm[place] for place in range(longest) for of_arm in jobs if place < len(of_arm)]


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
        folder = self.config.data or self.config.output_dir / "pairs"
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
        run = self.config.output_dir / "runs" / job.key
        for steps in self.config.eval_steps:
            result = self.config.output_dir / "results" / job.key / f"{steps:06d}.json"
            identity = self._identity(job)
            if result.is_file():
                known = json.loads(result.read_text())
                if known["identity"] != identity:
                    raise ValueError(f"{result} was made with other settings: remove it, or choose another output_dir")
                if "diverged" in known:
                    break
                continue
            facts: dict[str, Any] = {"arm": job.arm, "rate": job.rate, "steps": steps, "identity": identity}
            facts |= {"settings": job.settings, "git_revision": git_revision()}
            try:
                self._train(job, run, steps, identity)
            except TrainingDivergedError as error:
                write_text(result, json.dumps(facts | {"diverged": first_line(error)}, default=str))
                break
            write_text(result, json.dumps(facts | self._score(job, run, steps), default=str))
        if not self.config.keep_runs and run.exists():
            shutil.rmtree(run)

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
        _ = study.pairs, study.task, study.clip, study.features
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
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
    keys = [job.key for job in jobs]
    print(write_study(config.output_dir, keys))
    best = best_of_arms(read_results(config.output_dir, keys))
    if config.compare_with and len(best) > 1:
        try:
            print(write_differences(config.output_dir, best, study.pairs, study.task, config.compare_with))
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: no differences: {error}; remove that job's results to draw again") from None
    for key, reason in failed.items():
        print(f"{key}: {reason}", file=sys.stderr)
    if failed and count == 1:
        raise SystemExit(1)
