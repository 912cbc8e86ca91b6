"""Is the step that a run chooses better than its last one, on prompts that it was not chosen by?

docs/studies/choosing.md has the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline

from ether_diffusion import pipelines
from ether_diffusion.evaluation.runner import Job
from ether_diffusion.evaluation.subjects.arms import method_of
from ether_diffusion.evaluation.subjects.derived import DerivedBench
from ether_diffusion.evaluation.subjects.protocols import Subject
from ether_diffusion.evaluation.subjects.summary import Result
from ether_diffusion.runs.drawing import load_pipeline
from ether_diffusion.runs.record import read_run


class ChoosingBench(DerivedBench):
    """The arms are drawn at their chosen step as well: ``arm, best``."""

    def check_arm(self, job: Job[Subject]) -> None:
        """Raise ValueError unless its trainings choose a step."""
        if not method_of(job).is_own or not {"dino", "clip", "validation_steps"} <= set(job.settings):
            raise ValueError(f"arm {job.arm}: a step is chosen of an adapter of this library, by dino and clip")

    def learnt(self, job: Job[Subject]) -> tuple[DiffusionPipeline, dict[str, Any]]:
        """With the chosen step, and the prompts that it was chosen by."""
        pipe, facts = super().learnt(job)
        run = read_run(self._path("runs", self.origin_of(job)))
        return pipe, {**facts, "chosen_step": run.best_step, "chosen_by": [each["prompt"] for each in run.prompts]}

    def derived(self, origin: Job[Subject], way: str) -> DiffusionPipeline:
        """With the adapter of the chosen step, fused."""
        pipe = load_pipeline(self.config.base, self.device)
        pipelines.load(pipe, self._path("runs", origin), subfolder=way)
        pipelines.fuse(pipe)
        return pipe

    def compared(self, results: list[Result]) -> list[Result]:
        """Without the pictures of prompts that the step was chosen by."""
        return on_other_prompts(results)


def on_other_prompts(results: Sequence[Result]) -> list[Result]:
    """Results without the pictures of prompts that a step was chosen by."""
    chosen_by = {prompt for result in results for prompt in result.get("chosen_by", [])}
    return [
        {**result, "images": [row for row in result.get("images", []) if row["prompt"] not in chosen_by]}
        for result in results
    ]
