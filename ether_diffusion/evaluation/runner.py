"""The one job loop of all studies: plan, share over processes, train or go on, collect what fails.

What is done stays done: a job whose result is there is not done again, and a training goes on from its last checkpoint.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from ether_diffusion.evaluation.settings import share_of
from ether_diffusion.files import write_text
from ether_diffusion.logs import hide_loading_bars
from ether_diffusion.pipelines.file import first_line
from ether_diffusion.private import forget_accelerator
from ether_diffusion.reading import read_bytes, read_text
from ether_diffusion.runs.folder import list_checkpoints, read_provenance
from ether_diffusion.runs.written import check_inputs, remove_written
from ether_diffusion.training.config import TrainingConfig
from ether_diffusion.training.loop import TrainingInterruptedError

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainingConfig)

DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RESULTS = "results"
"""In the folder of a study: what its jobs found, and why some failed."""
CLAIMS = ".claims"
"""Beside it: a lock for each job, held while a process does it."""
PAUSE = 1.0
"""Seconds between two looks at jobs that all are another process's."""


class Named(Protocol):
    """What jobs are about where a study has several such things: the subjects of a benchmark."""

    @property
    def name(self) -> str:
        """Unique, fit for a folder."""


Subject = TypeVar("Subject", bound=Named | None)


@dataclass(frozen=True)
class Job(Generic[Subject]):
    """An arm with one seed, and in a benchmark one subject: trained once, or for an anchor only asked for.

    Attributes:
        arm: its name.
        settings: of its training, but for what the study sets itself; empty for an anchor.
        subject: what is learnt; None where a study has no subjects.
        seed: of training and images.
        rate: its learning rate, where the arm names one: part of what it is called.
    """

    arm: str
    settings: dict[str, Any]
    subject: Subject
    seed: int
    rate: float | None = None

    @property
    def key(self) -> str:
        """Its folder below those of the study."""
        arm = self.arm if self.rate is None else f"{self.arm}@{self.rate:g}"
        return f"{arm}/seed-{self.seed}" if self.subject is None else f"{arm}/{self.subject.name}/seed-{self.seed}"


class Study(ABC, Generic[Subject]):
    """What the loop does not know of a study: its jobs, and what is to be done with each."""

    @property
    @abstractmethod
    def output_dir(self) -> Path:
        """Where runs, images and results go."""

    @abstractmethod
    def jobs(self) -> list[Job[Subject]]:
        """All jobs, once all that they need is there, so that a mistake in the last shows before the first runs.

        Raises:
            ImportError, OSError, ValueError: a setting is impossible, or a judge or data are missing.
        """

    @abstractmethod
    def write_outline(self, jobs: Sequence[Job[Subject]]) -> None:
        """Write what a reader of the folder must know before there are results."""

    @abstractmethod
    def run_job(self, job: Job[Subject]) -> None:
        """Do what is not done of a job.

        Raises:
            TrainingInterruptedError: Ctrl-C or SIGTERM; the same job goes on where it was.
            ValueError: results are there that were made with other settings.
        """

    @abstractmethod
    def summarize(self, jobs: Sequence[Job[Subject]]) -> tuple[str, list[str]]:
        """Write tables and figures of what is done; return them as text, and the keys of the jobs that are not."""


def run_study(make: Callable[[torch.device], Study[Subject]], shard: str | None = None) -> bool:
    """Do this process's share of a study's jobs, write the summary of all that are done, and print it.

    Args:
        make: makes the study, given the device of this process.
        shard: see :func:`share_of`; the processes of one shard share its jobs.

    Returns:
        Whether all jobs of all processes have a result; in one of several processes they may not yet.

    Raises:
        SystemExit: a setting is impossible, a judge is missing, a signal came, or, in a single process, jobs failed.
    """
    (part, parts), (index, count) = share_of(shard), take_share()
    hide_loading_bars()  # of which every job has several
    try:
        study = make(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        jobs = study.jobs()
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    study.write_outline(jobs)
    try:
        failed = run_jobs(study, jobs[part + parts * index :: parts * count])
    except TrainingInterruptedError as error:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + error.signal) from None
    text, missing = study.summarize(jobs)
    print(text)
    for key, reason in failed.items():
        print(f"{key}: {reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} jobs failed; the same command tries them again", file=sys.stderr)
        if count == 1:  # one of several processes would take the others with it
            raise SystemExit(1)
    return not missing


def run_jobs(study: Study[Subject], jobs: Sequence[Job[Subject]]) -> dict[str, str]:
    """Do the jobs that are not done; return the errors of those that failed, by key.

    Raises:
        TrainingInterruptedError: Ctrl-C or SIGTERM; the same jobs go on where they were.
    """
    failed: dict[str, str] = {}
    waiting, passed = deque(jobs), 0
    with tqdm(total=len(jobs), unit="job") as progress:
        while waiting:
            job = waiting.popleft()
            progress.set_postfix_str(job.key)
            with claimed(study.output_dir, job.key) as mine:
                if mine:
                    _do(study, job, failed)
            if mine:
                progress.update()
                passed = 0
                continue
            waiting.append(job)  # another process does it; what that leaves undone is done here
            passed += 1
            if passed >= len(waiting):
                time.sleep(PAUSE)
                passed = 0
    return failed


def _do(study: Study[Subject], job: Job[Subject], failed: dict[str, str]) -> None:
    told = _failure(study.output_dir, job.key)
    try:
        study.run_job(job)
    except TrainingInterruptedError:
        raise
    except Exception as error:  # one failure must not cost the others
        logger.error("%s failed: %s", job.key, first_line(error))
        logger.debug("traceback", exc_info=True)
        failed[job.key] = f"{type(error).__name__}: {error}"
        write_text(told, failed[job.key])
    else:
        told.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path, key: str) -> Iterator[bool]:
    """Within the context no other process of this or another node does the job; False where one does it already.

    The system frees a claim when its process dies, however it dies.
    """
    path = folder / CLAIMS / f"{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def why_missing(folder: Path, key: str) -> str:
    """A job without a result: why it failed, or that nobody came to it."""
    told = _failure(folder, key)
    return f"{key} ({read_text(told)})" if told.is_file() else f"{key} (not done yet)"


def _failure(folder: Path, key: str) -> Path:
    return folder / RESULTS / f"{key}.error.txt"


def train(config: Config, program: Callable[[Config], Path], mark: str) -> dict[str, Any]:
    """Train, or go on from the last checkpoint of the same training, unless it is finished; return its provenance.

    Args:
        config: its settings, with its run folder.
        program: that trains.
        mark: stands for all that the training depends on; another one in the run folder starts it anew.
    """
    run = config.output_dir
    marker = run / "job.txt"
    same = marker.is_file() and read_bytes(marker) == mark.encode()
    known = read_provenance(run) if same else {}
    if known.get("status") == "finished" and known.get("step") == config.max_train_steps:
        return known
    if same and list_checkpoints(run / "checkpoints"):
        config.resume = "latest"
    config.overwrite = config.resume is None
    write_text(marker, mark)
    forget_accelerator()  # of the run before
    program(config)
    return read_provenance(run)


CACHED = re.compile(
    r"(cache/(.*/)?[0-9a-f]{64}\.(safetensors|png)|class_images/(class-\d{6}\.png|generated\.txt)|job\.txt)"
)
"""What a training of a study leaves in its folder besides what its record names."""


def remove_training(run: Path) -> None:
    """Remove what a training of a study wrote, and the folders that are empty then; anything else stays."""
    remove_written(run)
    for path, _, names in os.walk(run, topdown=False):
        for file in (Path(path) / name for name in names):
            if CACHED.fullmatch(file.relative_to(run).as_posix()):
                file.unlink()
        with suppress(OSError):  # something else is in it
            os.rmdir(path)


def check_study_inputs(output_dir: Path, inputs: Mapping[str, Path | None]) -> None:
    """Refuse inputs that are where a study writes.

    Raises:
        ValueError: one is.
    """
    names = ("runs", "images", RESULTS)
    check_inputs(output_dir, {name: path for name, path in inputs.items() if path is not None}, names)


def hash_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The hashes that are recorded and known now and differ, both of each: ``unet 0123 → 4567``.

    What is recorded of one side only contradicts nothing.
    """
    both = [name for name in now if before.get(name) is not None and now[name] is not None]
    return [f"{name} {before[name]} → {now[name]}" for name in both if before[name] != now[name]]


def take_share(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which of how many processes this one is, as ``accelerate launch`` or torchrun say.

    The processes of a study share jobs, not gradients: each is to train alone, so what would join them is taken out of
    this process's environment, and of several GPUs each sees its own.
    """
    index, count = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if count > 1:
        local = int(environment.get("LOCAL_RANK", 0))
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local % len(visible)] if visible else str(local)
    for name in DISTRIBUTED:
        os.environ.pop(name, None)
    return index, count
