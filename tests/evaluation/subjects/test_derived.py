"""Arms that draw another arm's training: they train nothing of their own, and their facts are of that training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion import pipelines
from ether_diffusion.evaluation.runner import Job, run_jobs
from ether_diffusion.evaluation.subjects.derived import DerivedBench
from ether_diffusion.evaluation.subjects.protocols import Subject
from ether_diffusion.evaluation.subjects.settings import DerivedConfig
from ether_diffusion.evaluation.subjects.summary import all_results
from ether_diffusion.metrics.distances import components, trained_layers
from ether_diffusion.metrics.scoring import Judges
from ether_diffusion.private import forget_accelerator
from ether_diffusion.runs.drawing import load_pipeline, load_run
from ether_diffusion.training import dreambooth


@dataclass
class DoubledConfig(DerivedConfig):
    WAYS: ClassVar[tuple[str, ...]] = ("doubled",)


class Doubled(DerivedBench):
    """The further way is a base with twice the learnt change in its weights, and no adapter."""

    def check_arm(self, job: Job[Subject]) -> None:
        pass

    @torch.no_grad()
    def derived(self, origin: Job[Subject], way: str) -> DiffusionPipeline:
        assert way == "doubled"
        learnt = load_run(self._path("runs", origin))
        paths = trained_layers(learnt.unet)
        pipelines.fuse(learnt)
        pipe = load_pipeline(self.config.base)
        for path in paths:
            weight, before = learnt.unet.get_submodule(path).weight, pipe.unet.get_submodule(path).weight
            before.copy_(2 * weight - before)
        return pipe


class Judge:
    identity: ClassVar = {"model": "nobody"}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerator()


@pytest.fixture
def bench(tmp_path: Path, base_folder: Path) -> Doubled:
    folder = tmp_path / "dog"
    folder.mkdir()
    Image.new("RGB", (32, 32), (40, 90, 60)).save(folder / "0.png")
    subject = Subject("dog", "dog", folder, ("a {token} dog",), ())
    training = {"pretrained_model_name_or_path": str(base_folder), "max_train_steps": 2, "resolution": 32}
    config = DoubledConfig(tmp_path / "bench", arms={"mine": {"learning_rate": 0.1}}, training=training)
    return Doubled(config, [subject], Judges(Judge(), Judge()), torch.device("cpu"))  # type: ignore[arg-type]


def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is trained from now on."""
    found: list[Any] = []
    run = dreambooth.run
    monkeypatch.setattr(dreambooth, "run", lambda config: found.append(config) or run(config))
    return found


def test_a_further_way_knows_its_training_and_is_measured_on_the_trained_layers(
    bench: Doubled, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = trainings(monkeypatch)
    job = next(job for job in bench.jobs() if job.arm == "mine, doubled")
    pipe, facts = bench.learnt(job)  # also where its origin has not been done
    _, of_origin = bench.learnt(bench.origin_of(job))
    assert len(trained) == 1
    assert facts["trained_parameters"] == of_origin["trained_parameters"]
    assert facts["distances"]["weights"] == pytest.approx(2 * of_origin["distances"]["weights"], rel=1e-4)
    assert len(trained_layers(components(pipe)["unet"])) > len(trained_layers(load_run(trained[0].output_dir).unet))


def test_a_training_that_diverged_is_not_repeated_for_every_way(
    bench: Doubled, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.config.arms = {"full": {"method": "full", "learning_rate": 1e30, "max_train_steps": 8, "max_grad_norm": 0}}
    trained = trainings(monkeypatch)
    assert run_jobs(bench, [job for job in bench.jobs() if job.arm.startswith("full")]) == {}
    assert len(trained) == 1
    last, doubled = sorted(all_results(bench.output_dir), key=lambda result: str(result["arm"]))
    assert "not finite" in last["diverged"]
    assert doubled["diverged"] == last["diverged"]
    assert ("way" in last, doubled["way"]) == (False, "doubled")
