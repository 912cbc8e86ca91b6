"""The one training loop: steps, checkpoints, samples, and a clean end for whatever ends it."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ether_diffusion.core.adapter import Adapter
from ether_diffusion.families.protocol import Family
from ether_diffusion.runs.folder import MetricsFile, Provenance, forget_after, list_checkpoints
from ether_diffusion.runs.report import write_report
from ether_diffusion.training.averages import Averages
from ether_diffusion.training.batches import Batch
from ether_diffusion.training.checkpoints import Checkpoints, adapter_folder
from ether_diffusion.training.choosing import Choosing
from ether_diffusion.training.interrupts import Interrupts
from ether_diffusion.training.model import DenoisingModel
from ether_diffusion.training.optimizers import learning_rates, make_optimizer, make_schedule
from ether_diffusion.training.samples import Sampler, Shown, has_samples, inactive, write_samples
from ether_diffusion.training.sections import HubSection, LoopSection, OptimizerSection, SavingSection
from ether_diffusion.training.seen import SEEN, Seen
from ether_diffusion.training.telling import Telling
from ether_diffusion.training.trainables import ADAPTER_NAME, Trainable, trained_state
from ether_diffusion.training.validation import Validation

logger = logging.getLogger(__name__)

Section = TypeVar("Section")

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
class Lane:
    """One training: most runs have one; several share a batch, each with its own data, adapter and run folder.

    Attributes:
        saving: what is written of it, and its run folder.
        hub: its upload.
        trainables: what is trained.
        sampler: draws the sample grids.
        shown: what the sample grids show.
        provenance: of its run folder.
        name: of its adapter, where there are several lanes.
        validation: what its loss is compared on, at every step with samples.
        seen: how often each picture is shown; None for an endless source, which shows each once.
        choosing: scores the sample grids and keeps the best adapter, where the run has judges.
    """

    saving: SavingSection
    hub: HubSection
    trainables: list[Trainable]
    sampler: Sampler
    shown: list[Shown]
    provenance: Provenance
    name: str | None = None
    validation: Validation | None = None
    seen: Seen | None = None
    choosing: Choosing | None = None

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained; found once, for LoRA's are found among all parameters of the model."""
        return [parameter for trainable in self.trainables for parameter in trainable.parameters()]


@dataclass
class Task:
    """What a training program gives to the loop.

    Attributes:
        family: of the base, on the device, with what is trained attached.
        model: its forward takes a list of batches for each lane and returns scalar losses for each, among them "loss".
        batches: from (first step, end step) to this process's micro-batches, ``gradient_accumulation_steps`` a step,
            each with a list of batches for every lane.
        lanes: the trainings.
        begin: makes the run folders this run's own; called when nothing can refuse the run any more.
        together: provenance of the folder that holds several lanes'.
    """

    family: Family
    model: DenoisingModel
    batches: Callable[[int, int], Iterator[list[list[Batch]]]]
    lanes: list[Lane]
    begin: Callable[[], None]
    together: Provenance | None = None

    @property
    def trainables(self) -> list[Trainable]:
        """What all lanes train."""
        return [trainable for lane in self.lanes for trainable in lane.trainables]


class Sectioned(Protocol):
    """Settings that sections can be taken out of."""

    def section(self, kind: type[Section]) -> Section:
        """One of :mod:`ether_diffusion.training.sections`."""


@dataclass(frozen=True)
class LoopSettings:
    """What the loop and its parts need of the settings."""

    loop: LoopSection
    optimizer: OptimizerSection
    saving: SavingSection

    @classmethod
    def of(cls, settings: Sectioned) -> LoopSettings:
        """Take them out of the settings."""
        take = settings.section
        return cls(take(LoopSection), take(OptimizerSection), take(SavingSection))


def train(task: Task, settings: LoopSettings, accelerator: Accelerator, start: Path | None) -> None:
    """Train to ``max_train_steps``, from the checkpoint ``start`` if there is one.

    Raises:
        TrainingDivergedError: a loss or gradient was not finite; nothing of that step is kept.
        TrainingInterruptedError: a signal ended the run; a checkpoint was saved.
    """
    section = settings.loop
    optimizer = make_optimizer(task.trainables, settings.optimizer)
    schedule = make_schedule(optimizer, settings.optimizer)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    accelerator.register_for_checkpointing(schedule)  # to save it; it is read back without pickle
    averages = None
    if section.ema_decay is not None:
        averages = Averages(trained_state(task.trainables), section.ema_decay)
    chosen = {lane.name or ADAPTER_NAME: lane.choosing for lane in task.lanes if lane.choosing is not None}
    checkpoints = Checkpoints(accelerator, task.family.pipe, task.trainables, settings.saving, averages, chosen)
    step = checkpoints.load(start, optimizer, schedule) if start else 0
    task.begin()  # all checks are behind us: from here on the run folder is this run's
    checkpoints.remove_leftovers()
    run = _Run(task, section, accelerator, checkpoints, step)
    run.begin_choosing(start, step)
    if step >= section.max_train_steps:
        logger.warning(
            "the run is at step %d of %d already: raise --max_train_steps to go on", step, section.max_train_steps
        )
    micro_batches = task.batches(step, section.max_train_steps)
    model.train()
    with Interrupts() as interrupts, run.telling, run.failures_recorded():
        run.sample_if_due(step, interrupts)
        while step < section.max_train_steps and not run.ended:
            if received := _any_process(interrupts.received, accelerator):
                checkpoints.save(step)
                run.stop_for(received)
            began = time.perf_counter()
            losses: list[list[dict[str, Tensor]]] = []
            for _ in range(section.gradient_accumulation_steps):
                with accelerator.accumulate(model):
                    losses.append(model(next(micro_batches)))
                    accelerator.backward(torch.stack([lane["loss"] for lane in losses[-1]]).sum())
                    if accelerator.sync_gradients:
                        rest(task.trainables, step + 1)
                        measured = run.clip(_means(losses, accelerator), step + 1, learning_rates(optimizer))
                    optimizer.step()
                    optimizer.zero_grad()
            rates = learning_rates(optimizer)
            skipped = accelerator.optimizer_step_was_skipped
            run.check_skipped(skipped, rates)
            if not skipped:
                schedule.step()
            step += 1
            if averages is not None and not skipped:
                averages.update(step)
            run.log(step, measured, rates, time.perf_counter() - began)
            if step == section.max_train_steps or step % section.checkpointing_steps == 0:
                checkpoints.save(step)
            run.sample_if_due(step, interrupts)
        if run.ended:
            run.end_early(step)
        run.record_pictures()
    if averages is not None:
        averages.take_over()  # what is saved of the run
    accelerator.wait_for_everyone()


class _Run:
    """What happens beside the arithmetic: metrics, samples, the report, the status."""

    def __init__(
        self,
        task: Task,
        section: LoopSection,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
        start_step: int,
    ) -> None:
        self.task = task
        self.section = section
        self.accelerator = accelerator
        self.checkpoints = checkpoints
        self.step = start_step
        self.skipped = 0
        self.ended = False
        self.before = float(task.lanes[0].provenance.content["seconds"])
        self.began = time.perf_counter()
        self.telling = Telling(section, start_step, accelerator.device)
        self.metrics: list[MetricsFile] = []
        self.validations: list[MetricsFile] = []
        if accelerator.is_main_process:
            for folder in dict.fromkeys([section.output_dir, *(lane.saving.output_dir for lane in task.lanes)]):
                forget_after(folder, start_step)
            folders = [lane.saving.output_dir for lane in task.lanes]
            self.metrics = [MetricsFile(folder / "metrics.jsonl", start_step) for folder in folders]
            self.validations = [MetricsFile(folder / "validation.jsonl", start_step) for folder in folders]

    def clip(self, means: list[dict[str, float]], step: int, rates: dict[str, float]) -> list[dict[str, float]]:
        """Clip every lane's gradients to their norm, and return its losses with it."""
        measured = []
        for lane, losses in zip(self.task.lanes, means, strict=True):
            norm = float(self.accelerator.clip_grad_norm_(lane.parameters, self.section.max_grad_norm or math.inf))
            self.check_finite(losses["loss"], norm, step, rates, lane.name)
            measured.append({**losses, "grad_norm": norm})
        return measured

    def log(self, step: int, measured: list[dict[str, float]], rates: dict[str, float], seconds: float) -> None:
        self.step = step
        loss = sum(row["loss"] for row in measured) / len(measured)
        self.telling.step(step, loss, next(iter(rates.values())), seconds)
        tracked: dict[str, float] = {}
        for number, (lane, row) in enumerate(zip(self.task.lanes, measured, strict=True)):
            own = {each.component: rates[each.key] if each.learns(step) else 0.0 for each in lane.trainables}
            if self.metrics:
                self.metrics[number].append({"step": step, **row, "lr": own, "steps_per_second": 1 / seconds})
            values = {**row, **{f"lr/{component}": rate for component, rate in own.items()}}
            tracked |= {key if lane.name is None else f"{lane.name}/{key}": value for key, value in values.items()}
        self.accelerator.log(tracked, step=step)

    def sample_if_due(self, step: int, interrupts: Interrupts) -> None:
        """Write and score the grid of a step that is due, if it is not there, and renew the report; ``finish`` writes
        the last one.

        A signal gives the grid up; the run stops before its next step, so that resuming draws it.
        """
        finished = step == self.section.max_train_steps
        due = finished or step % self.section.validation_steps == 0
        if self.accelerator.is_main_process and due:
            averages = self.checkpoints.averages
            stop = lambda: bool(interrupts.received)  # noqa: E731
            with self.telling.drawing(), nullcontext() if averages is None else averages.acting():
                for number, lane in enumerate(self.task.lanes):
                    self._validate(lane, self.validations[number], step)
                    folder = lane.saving.output_dir / "samples" / f"step-{step:06d}"
                    if self.section.num_validation_images and not has_samples(folder):
                        self._only(lane)
                        write_samples(lane.sampler, lane.trainables, lane.shown, step, stop)
                    if lane.choosing is not None:
                        lane.choosing.look(step, partial(self.checkpoints.save_adapter, lane.name or ADAPTER_NAME))
                        lane.provenance.update(files=lane.choosing.files)  # before other lanes take their time
            self.update("running", report=not finished)
        self.accelerator.wait_for_everyone()
        if due:
            exhausted = any(lane.choosing is not None and lane.choosing.exhausted for lane in self.task.lanes)
            self.ended = not finished and bool(_any_process(int(exhausted), self.accelerator))

    def begin_choosing(self, start: Path | None, step: int) -> None:
        """Go on with the best adapters up to the checkpoint ``start``."""
        averages = self.checkpoints.averages
        with nullcontext() if averages is None else averages.acting():
            for lane in self.task.lanes:
                if lane.choosing is not None:
                    own = None if start is None else adapter_folder(start, lane.name or ADAPTER_NAME)
                    save = partial(self.checkpoints.save_adapter, lane.name or ADAPTER_NAME)
                    lane.choosing.begin(own, step, save)
                    lane.provenance.update(files=lane.choosing.files)

    def end_early(self, step: int) -> None:
        """Save and record that no later step was better; what is trained stays that of the last step."""
        if step % self.section.checkpointing_steps:
            self.checkpoints.save(step)
        logger.info("early stopping ends the run after step %d of %d", step, self.section.max_train_steps)
        if self.accelerator.is_main_process:
            for lane in self.task.lanes:
                lane.provenance.update(stopped_early=True)

    def _validate(self, lane: Lane, file: MetricsFile, step: int) -> None:
        """Log the loss on the fixed pictures, unless it is there; at step 0 that of the base without adapter."""
        if lane.validation is None or file.last_step == step:
            return
        self._only(lane)
        with inactive(lane.trainables if step == 0 else []):
            found = lane.validation.loss(self.task.model, self.accelerator.autocast)
        file.append({"step": step, **found})
        name = "val/loss" if lane.name is None else f"{lane.name}/val/loss"
        self.accelerator.log({name: found["loss"]}, step=step)

    def _only(self, lane: Lane) -> None:
        """Let no adapter but the lane's act, where there are several; the next step gives each sample its own again."""
        for trainable in lane.trainables if lane.name is not None else ():
            if isinstance(trainable.module, Adapter) and trainable.module.host is not None:
                trainable.module.host.set_active({trainable.adapter: 1.0})

    def check_finite(
        self, loss: float, norm: float, step: int, rates: dict[str, float], lane: str | None = None
    ) -> None:
        # under fp16 an overflowing gradient is the gradient scaler's business: it skips the step
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.mixed_precision == "fp16"):
            return
        what = ("loss" if not math.isfinite(loss) else "gradient") + ("" if lane is None else f" of {lane}")
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
            self.record_pictures()
            self.update("failed")
            raise

    def record_pictures(self) -> None:
        """Record how often each picture was shown, in a run that has not been killed."""
        if self.accelerator.is_main_process:
            for lane in self.task.lanes:
                if lane.seen is not None:
                    lane.provenance.update(**{SEEN: lane.seen.until(self.step)})

    def stop_for(self, received: int) -> None:
        self.record_pictures()
        self.update("interrupted")
        name = signal.Signals(received).name
        raise TrainingInterruptedError(
            f"stopped by {name} after step {self.step}, which is saved; --resume latest goes on from there", received
        )

    def update(self, status: str, report: bool = True) -> None:
        """Record how far the run is, and renew the report unless told otherwise."""
        if self.accelerator.is_main_process:
            seconds = self.before + time.perf_counter() - self.began
            facts = {"status": status, "step": self.step, "seconds": round(seconds, 1)}
            if self.task.together is not None:
                self.task.together.update(**facts)
            for lane in self.task.lanes:
                lane.provenance.update(**facts)
                if report:
                    write_report(lane.saving.output_dir)


def rest(trainables: list[Trainable], step: int) -> None:
    """Drop the gradients of what no longer learns: the optimiser leaves it as it is, and norms are without it."""
    for trainable in trainables:
        if not trainable.learns(step):
            for parameter in trainable.parameters():
                parameter.grad = None


def _means(losses: list[list[dict[str, Tensor]]], accelerator: Accelerator) -> list[dict[str, float]]:
    """Mean of every lane's losses over the rounds and processes of a step."""
    names = list(losses[0][0])
    rounds = [torch.stack([torch.stack([lane[name].detach() for name in names]) for lane in row]) for row in losses]
    reduced = accelerator.reduce(torch.stack(rounds).mean(0), reduction="mean")
    return [dict(zip(names, values, strict=True)) for values in reduced.tolist()]


def _any_process(received: int, accelerator: Accelerator) -> int:
    """The signal that any process received, so that all stop after the same step."""
    if accelerator.num_processes == 1:
        return received
    return int(accelerator.gather(torch.tensor([received], device=accelerator.device)).max())
