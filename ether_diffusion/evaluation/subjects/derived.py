"""A benchmark that draws each training in several ways: as it ended, and as what else is made of the same run."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import replace
from typing import Any

from diffusers import DiffusionPipeline

from ether_diffusion.evaluation.runner import PAUSE, Job, claimed
from ether_diffusion.evaluation.subjects.arms import is_anchor, method_of
from ether_diffusion.evaluation.subjects.benchmark import Bench
from ether_diffusion.evaluation.subjects.compact import WAY
from ether_diffusion.evaluation.subjects.protocols import Subject
from ether_diffusion.evaluation.subjects.settings import DerivedConfig
from ether_diffusion.evaluation.subjects.summary import read_result
from ether_diffusion.metrics.distances import components, mean_distances, trained_layers
from ether_diffusion.training.loop import TrainingDivergedError


class DerivedBench(Bench):
    """Its jobs are those of a benchmark, and after all trainings those that draw them in further ways."""

    config: DerivedConfig

    @abstractmethod
    def derived(self, origin: Job[Subject], way: str) -> DiffusionPipeline:
        """A pipeline made of the finished run of ``origin``, in that way."""

    @abstractmethod
    def check_arm(self, job: Job[Subject]) -> None:
        """Raise ValueError unless the arm can be drawn in all ways."""

    def jobs(self) -> list[Job[Subject]]:
        """Every job of the benchmark, then the further ways, so that processes do not wait for each other's trainings.

        Raises:
            ValueError: an arm cannot be drawn in the further ways.
        """
        trained = super().jobs()
        origins = [job for job in trained if not is_anchor(job)]
        for job in origins:
            self.check_arm(job)
        return trained + [replace(job, arm=f"{job.arm}, {way}") for job in origins for way in self.config.WAYS]

    def origin_of(self, job: Job[Subject]) -> Job[Subject]:
        """The job whose training this one draws; itself, unless it draws in a further way."""
        arm = self.config.drawn_arms.get(job.arm, job.arm)
        return job if arm == job.arm else replace(job, arm=arm)

    def drawn_as(self, job: Job[Subject]) -> dict[str, str]:
        """The further way, where there is one."""
        origin = self.origin_of(job)
        return {} if origin is job else {WAY: job.arm.removeprefix(f"{origin.arm}, ")}

    def learnt(self, job: Job[Subject]) -> tuple[DiffusionPipeline, dict[str, Any]]:
        """As the training ended, or in a further way.

        Raises:
            TrainingDivergedError: the training diverged, now or before.
        """
        origin = self.origin_of(job)
        if origin is job:
            return super().learnt(job)
        while True:  # another process may train it
            with claimed(self.output_dir, origin.key) as mine:
                if mine:
                    self._check_diverged(origin)
                    ended, facts = super().learnt(origin)
                    break
            time.sleep(PAUSE)
        pipe = self.derived(origin, self.drawn_as(job)[WAY])
        layers = {name: trained_layers(model) for name, model in components(ended).items()}
        base, method = components(self.base), method_of(origin).name
        facts["distances"] = mean_distances(components(pipe), base, method, layers)
        return pipe, facts

    def _check_diverged(self, origin: Job[Subject]) -> None:
        """Raise TrainingDivergedError where it did so already; another attempt would do the same."""
        path = self._path("results", origin, ".json")
        if path.is_file():
            known = read_result(path)
            self._check(known, path, origin)
            if "diverged" in known:
                raise TrainingDivergedError(known["diverged"])
