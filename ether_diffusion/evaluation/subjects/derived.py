"""A benchmark that draws each training in several ways: as it ended, and as what else is made of the same run."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from ether_diffusion.evaluation.runner import PAUSE, Job, claimed
from ether_diffusion.evaluation.subjects.arms import BenchmarkConfig, is_anchor
from ether_diffusion.evaluation.subjects.benchmark import Bench
from ether_diffusion.evaluation.subjects.protocols import Subject
from ether_diffusion.metrics.distances import components, mean_distances


@dataclass
class DerivedConfig(BenchmarkConfig):
    """A benchmark whose arms are drawn in further ways; what was trained is kept.

    Attributes:
        keep_runs: always, since the further ways are made of what was trained.
    """

    WAYS: ClassVar[tuple[str, ...]]
    """Names of the further ways; that of an arm is called ``arm, way``."""

    keep_runs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keep_runs:
            raise ValueError("keep_runs must stay true: the further ways are made of what was trained")

    @property
    def drawn_arms(self) -> list[str]:
        """Each arm as it ended, and in every further way."""
        return [name for arm in self.arms for name in (arm, *(f"{arm}, {way}" for way in self.WAYS))]


class DerivedBench(Bench):
    """Its jobs are those of a benchmark, and after each training one for every further way."""

    config: DerivedConfig

    @abstractmethod
    def derived(self, origin: Job[Subject], way: str) -> DiffusionPipeline:
        """A pipeline made of the finished run of ``origin``, in that way."""

    @abstractmethod
    def check_arm(self, job: Job[Subject]) -> None:
        """Raise ValueError unless the arm can be drawn in all ways."""

    def jobs(self) -> list[Job[Subject]]:
        """Every job, subject by subject.

        Raises:
            ValueError: an arm cannot be drawn in the further ways.
        """
        found = []
        for job in super().jobs():
            found.append(job)
            if not is_anchor(job):
                self.check_arm(job)
                found += [replace(job, arm=f"{job.arm}, {way}") for way in self.config.WAYS]
        return found

    def origin_of(self, job: Job[Subject]) -> Job[Subject]:
        """The job whose training this one draws; itself, unless it draws in a further way."""
        arm, _, way = job.arm.rpartition(", ")
        return replace(job, arm=arm) if way in self.config.WAYS and arm in self.config.arms else job

    def learnt(self, job: Job[Subject]) -> tuple[DiffusionPipeline, dict[str, Any]]:
        """As the training ended, or in a further way."""
        origin = self.origin_of(job)
        if origin is job:
            return super().learnt(job)
        while True:  # another process may train it
            with claimed(self.output_dir, origin.key) as mine:
                if mine:
                    _, facts = super().learnt(origin)
                    break
            time.sleep(PAUSE)
        pipe = self.derived(origin, job.arm.removeprefix(f"{origin.arm}, "))
        facts["distances"] = mean_distances(components(pipe), components(self.base), str(origin.settings["method"]))
        return pipe, facts
