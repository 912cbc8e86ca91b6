"""The one training loop: steps, checkpoints, samples, and a clean end for whatever ends it."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from ether_diffusion.training.batches import Batch
from ether_diffusion.training.checkpoints import Checkpoints, list_checkpoints
from ether_diffusion.training.config import TrainingConfig
from ether_diffusion.training.interrupts import Interrupts
from ether_diffusion.training.optimizers import learning_rates, make_optimizer, make_schedule
from ether_diffusion.training.report import write_report
from ether_diffusion.training.run_folder import MetricsFile, Provenance, forget_after
from ether_diffusion.training.samples import Sampler, Shown, write_samples
from ether_diffusion.training.trainables import Trainable

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 30
"""The scaler halves its scale of 65536 at every skipped step: after 30 it is far below any that helps."""


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient is not finite; the last good checkpoint is named."""


class TrainingInterruptedError(RuntimeError):
    """Ctrl-C or SIGTERM ended the run after a step; it was saved and can be resumed.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number


@dataclass
class Task:
    """What a training program gives to the loop.

    Attributes:
        pipe: the base, on the device, with what is trained attached.
        trainables: what is trained.
        model: its forward takes a list of batches and returns scalar losses, among them "loss".
        batches: from (first step, end step) to this process's micro-batches, ``gradient_accumulation_steps`` a step.
        sampler: draws the sample grids.
        shown: what the sample grids show.
    """

    pipe: DiffusionPipeline
    trainables: list[Trainable]
    model: nn.Module
    batches: Callable[[int, int], Iterator[list[Batch]]]
    sampler: Sampler
    shown: list[Shown]


def train(
    task: Task, config: TrainingConfig, accelerator: Accelerator, start: Path | None, provenance: Provenance
) -> None:
    """Train to ``config.max_train_steps``, from the checkpoint ``start`` if there is one.

    Raises:
        TrainingDivergedError: a loss or gradient was not finite; nothing of that step is kept.
        TrainingInterruptedError: a signal ended the run; a checkpoint was saved.
    """
    optimizer = make_optimizer(task.trainables, config)
    schedule = make_schedule(optimizer, config)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    checkpoints = Checkpoints(accelerator, task.pipe, task.trainables, config)
    step = checkpoints.load(start) if start else 0
    run = _Run(task, config, accelerator, provenance, checkpoints, step)
    parameters = [parameter for trainable in task.trainables for parameter in trainable.parameters()]
    if step >= config.max_train_steps:
        logger.warning(
            "the run is at step %d of %d already: raise --max_train_steps to go on", step, config.max_train_steps
        )
    micro_batches = task.batches(step, config.max_train_steps)
    model.train()
    with Interrupts() as interrupts, run.progress_bar(step) as bar, run.failures_recorded():
        run.sample_if_due(step, interrupts)
        while step < config.max_train_steps:
            if received := _any_process(interrupts.received, accelerator):
                checkpoints.save(step)
                run.stop_for(received)
            began = time.perf_counter()
            losses: list[dict[str, Tensor]] = []
            for _ in range(config.gradient_accumulation_steps):
                with accelerator.accumulate(model):
                    losses.append(model(next(micro_batches)))
                    accelerator.backward(losses[-1]["loss"])
                    if accelerator.sync_gradients:
                        means = _means(losses, accelerator)
                        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
                        run.check_finite(means["loss"], float(norm), step + 1, learning_rates(optimizer))
                    optimizer.step()
                    optimizer.zero_grad()
            rates = learning_rates(optimizer)
            skipped = accelerator.optimizer_step_was_skipped
            run.check_skipped(skipped, rates)
            if not skipped:
                schedule.step()
            step += 1
            run.log(step, {**means, "grad_norm": float(norm)}, rates, time.perf_counter() - began, bar)
            if step == config.max_train_steps or step % config.checkpointing_steps == 0:
                checkpoints.save(step)
            run.sample_if_due(step, interrupts)
    accelerator.wait_for_everyone()


class _Run:
    """What happens beside the arithmetic: metrics, samples, the report, the status."""

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        accelerator: Accelerator,
        provenance: Provenance,
        checkpoints: Checkpoints,
        start_step: int,
    ) -> None:
        self.task = task
        self.config = config
        self.accelerator = accelerator
        self.provenance = provenance
        self.checkpoints = checkpoints
        self.step = start_step
        self.skipped = 0
        self.before = float(provenance.content["seconds"])
        self.began = time.perf_counter()
        self.metrics = None
        if accelerator.is_main_process:
            forget_after(config.output_dir, start_step)
            self.metrics = MetricsFile(config.output_dir, start_step)

    def progress_bar(self, step: int) -> tqdm[Any]:
        hidden = not self.accelerator.is_main_process
        total = self.config.max_train_steps
        return tqdm(total=total, initial=step, desc="training", unit="step", disable=hidden, dynamic_ncols=True)

    def log(
        self, step: int, measured: dict[str, float], rates: dict[str, float], seconds: float, bar: tqdm[Any]
    ) -> None:
        self.step = step
        bar.update()
        bar.set_postfix(loss=f"{measured['loss']:.4f}", lr=f"{next(iter(rates.values())):.2e}")
        if self.metrics is not None:
            self.metrics.append({"step": step, **measured, "lr": rates, "steps_per_second": 1 / seconds})
        self.accelerator.log({**measured, **{f"lr/{c}": rate for c, rate in rates.items()}}, step=step)

    def sample_if_due(self, step: int, interrupts: Interrupts) -> None:
        """Write the grid of a step that is due and not there yet, and renew the report.

        A signal gives the grid up; the run stops before its next step, so that resuming draws it.
        """
        finished = step == self.config.max_train_steps
        due = finished or step % self.config.validation_steps == 0
        if self.accelerator.is_main_process and due:
            folder = self.config.output_dir / "samples" / f"step-{step:06d}"
            if self.config.num_validation_images and not folder.is_dir():
                stop = lambda: bool(interrupts.received)  # noqa: E731
                write_samples(self.task.sampler, self.task.trainables, self.task.shown, step, stop)
            self.update("running")
        self.accelerator.wait_for_everyone()

    def check_finite(self, loss: float, norm: float, step: int, rates: dict[str, float]) -> None:
        # under fp16 an overflowing gradient is the gradient scaler's business: it skips the step
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.mixed_precision == "fp16"):
            return
        what = "loss" if not math.isfinite(loss) else "gradient"
        self._stop(f"the {what} is not finite at step {step}: loss {loss}, gradient norm {norm}", rates)

    def check_skipped(self, skipped: bool, rates: dict[str, float]) -> None:
        """The scaler of fp16 skips steps while it looks for its scale; when it skips on and on, there is none."""
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped >= MAX_SKIPPED_STEPS:
            self._stop(f"the gradients of {self.skipped} steps up to step {self.step + 1} overflowed in fp16", rates)

    def _stop(self, what: str, rates: dict[str, float]) -> NoReturn:
        good = list_checkpoints(self.checkpoints.folder)
        last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        advice = "a lower --learning_rate, or bf16 instead of fp16, usually helps"
        raise TrainingDivergedError(f"{what}, learning rate {rates}; {last}; {advice}")

    @contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Whatever ends the run early, its folder and report say so."""
        try:
            yield
        except TrainingInterruptedError:
            raise
        except BaseException:
            self.update("failed")
            raise

    def stop_for(self, received: int) -> None:
        self.update("interrupted")
        name = signal.Signals(received).name
        raise TrainingInterruptedError(
            f"stopped by {name} after step {self.step}, which is saved; --resume latest goes on from there", received
        )

    def update(self, status: str) -> None:
        """Record how far the run is, and renew the report."""
        if self.accelerator.is_main_process:
            seconds = self.before + time.perf_counter() - self.began
            self.provenance.update(status=status, step=self.step, seconds=round(seconds, 1))
            write_report(self.config.output_dir)


def _means(losses: list[dict[str, Tensor]], accelerator: Accelerator) -> dict[str, float]:
    """Mean of every loss over the rounds and processes of a step."""
    stacked = torch.stack([torch.stack([row[name].detach() for name in losses[0]]) for row in losses]).mean(0)
    reduced = accelerator.reduce(stacked, reduction="mean")
    return dict(zip(losses[0], reduced.tolist(), strict=True))


def _any_process(received: int, accelerator: Accelerator) -> int:
    """The signal that any process received, so that all stop after the same step."""
    if accelerator.num_processes == 1:
        return received
    return int(accelerator.gather(torch.tensor([received], device=accelerator.device)).max())
