"""What every training program does around its training: settings, base, run folder, and errors in one line."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator

from ether_diffusion.data.buckets import check_resolution
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.quantization import quantize
from ether_diffusion.families.registry import family_of
from ether_diffusion.logs import hide_loading_bars, informs, is_first_process, show_logs
from ether_diffusion.pipelines.file import first_line
from ether_diffusion.pipelines.fingerprint import base_hashes
from ether_diffusion.playground import GUIDANCE
from ether_diffusion.runs.checksums import sha256
from ether_diffusion.runs.ending import ending
from ether_diffusion.runs.folder import (
    Provenance,
    changed_facts,
    changed_settings,
    clear_run_folder,
    open_run_folder,
    read_provenance,
    write_config,
)
from ether_diffusion.runs.lock import held
from ether_diffusion.runs.outputs import check_outputs
from ether_diffusion.runs.written import begin_record, check_inputs
from ether_diffusion.training import memory
from ether_diffusion.training.base_model import BaseModelError, describe_base, load_base
from ether_diffusion.training.config import TrainingConfig
from ether_diffusion.training.loop import TrainingDivergedError, TrainingInterruptedError
from ether_diffusion.training.samples import scheduler_class
from ether_diffusion.training.sections import BaseSection, ComputeSection
from ether_diffusion.training.setup import make_accelerator
from ether_diffusion.training.trainables import Trainable
from ether_diffusion.training.training_adapter import (
    TrainingAdapter,
    is_ether,
    load_training_adapter,
    training_adapter_file,
)

logger = logging.getLogger(__name__)

FAR = 2
"""A resolution more than so many times the base's own, or less than that part of it, is warned of."""

ALWAYS_RIGHT = 64
"""Pixels that every family's patches divide."""

PACKAGE = Path(__file__).resolve().parents[1]

Config = TypeVar("Config", bound=TrainingConfig)


def run_program(config: Config, run: Callable[[Config], Path]) -> None:
    """Train, and say where the result is.

    Raises:
        SystemExit: one clear line for what a user can mend; 128 + signal after Ctrl-C or SIGTERM, as shells do.
    """
    show_logs(config.log_level, config.quiet)
    hide_loading_bars()
    try:
        if config.dry_run:
            base = describe_base(config.section(BaseSection), config.mixed_precision or "no")
            base.settings = config.family_settings
            print(memory.report(base, replace(config, targets=config.targets or base.CONTROL_TARGETS)))
            return
        report = run(config)
    except (BaseModelError, ImportError, OSError, ValueError, TrainingDivergedError) as error:
        if isinstance(error, ValueError) and not raised_here(error):
            raise  # torch's or another library's: no setting of the user's, and its traceback is what helps
        logger.debug("traceback", exc_info=True)
        raise SystemExit(f"error: {error}") from None
    except torch.OutOfMemoryError as error:
        advice = "--gradient_checkpointing, --mixed_precision bf16, a smaller --train_batch_size or --resolution"
        raise SystemExit(f"error: out of memory ({first_line(error)}); what helps: {advice}") from None
    except TrainingInterruptedError as error:
        if is_first_process():
            print(error, file=sys.stderr)
        raise SystemExit(128 + error.signal) from None
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        print("stopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    if informs():
        print(ending(_results(config, report)), flush=True)


def _results(config: TrainingConfig, report: Path) -> list[Path]:
    """The run folders of a training: its own, or one for each of several subjects."""
    if report.parent == config.output_dir:
        return [config.output_dir]
    return [config.output_dir / name for name in read_provenance(config.output_dir)["subjects"]]


def raised_here(error: BaseException) -> bool:
    """Whether this package itself raised an error, and so wrote its message for users."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and Path(place.tb_frame.f_code.co_filename).is_relative_to(PACKAGE)


@dataclass
class Start(Generic[Config]):
    """Where a run starts from.

    Attributes:
        config: the settings with all that the base and Accelerate decide.
        accelerator: Accelerate.
        family: of the frozen base; its parts are where they were loaded, and the program places them.
        checkpoint: to continue from, None for a new run.
        base_hash: identity of the base, by component.
        records: of its run folders, which :meth:`begin` opens.
        training_adapter: what acts in training and not in drawing, if anything does.
        base_file: of a base in a single file its name and the SHA-256 of its content.
        summary: of what is going to be trained, told when it begins.
    """

    config: Config
    accelerator: Accelerator
    family: Family
    checkpoint: Path | None
    base_hash: dict[str, str | None]
    records: list[tuple[Provenance, TrainingConfig]] = field(default_factory=list)
    training_adapter: TrainingAdapter | None = None
    base_file: dict[str, str] | None = None
    summary: str = ""

    def begin(self) -> None:
        """Make the run folders this run's own: replace the run before, write settings and provenance, open trackers."""
        if not self.accelerator.is_main_process:
            return
        for provenance, config in self.records:
            if not self.checkpoint:
                clear_run_folder(config.output_dir)
            begin_record(config.output_dir)
            write_config(config.run)
            provenance.update(status="running")
        logger.info("%s", self.summary)
        if self.config.report_to:
            self.accelerator.init_trackers("ether-diffusion", {k: str(v) for k, v in self.config.to_dict().items()})


@contextmanager
def start_run(
    config: Config, check: Callable[[], object], folders: Callable[[], Sequence[Path]] = list
) -> Iterator[Start[Config]]:
    """Hold the run folder, open it and load the base.

    Args:
        config: the settings.
        check: looks at the data, before what is slow.
        folders: names the run folders of trainings side by side, which are held, too.

    Raises:
        BaseModelError: the base cannot be loaded.
        FileExistsError: the run folder holds a run already.
        FileNotFoundError: a folder is missing, or there is nothing to resume.
        FolderInUseError: another run holds the run folder.
        ValueError: a setting is impossible.
    """
    accelerator = make_accelerator(config.section(ComputeSection))
    check_inputs(config.output_dir, config.inputs)
    with ExitStack() as holding:
        if accelerator.is_main_process:
            for folder in dict.fromkeys((config.output_dir, *folders())):
                holding.enter_context(held(folder))
        yield _start(config, check, accelerator)


def _start(config: Config, check: Callable[[], object], accelerator: Accelerator) -> Start[Config]:
    with accelerator.main_process_first():
        checkpoint = open_run_folder(config.run) if accelerator.is_main_process or config.resume else None
    if accelerator.is_main_process:
        check_outputs(config.output_dir, config.repository)
    check()
    if config.sampler not in (None, "base"):
        scheduler_class(str(config.sampler))
    if config.training_adapter is not None:
        is_ether(training_adapter_file(config.training_adapter))
    section = config.section(BaseSection)
    if config.resolution is not None and config.resolution % ALWAYS_RIGHT:  # told before the weights are read
        with suppress(BaseModelError):  # which loading tells better
            check_resolution(config.resolution, describe_base(section, accelerator.mixed_precision).divisor)
    logger.info("loading the base %s", config.pretrained_model_name_or_path)
    pipe = load_base(section, accelerator.mixed_precision)
    family = family_of(pipe, config.family_settings)
    if (why := family.distilled) and config.training_adapter is None:
        logger.warning(
            "the base was distilled to few steps (%s): training undoes that; train its undistilled version where "
            "there is one, or beside an adapter that undoes it, --training_adapter FILE",
            why,
        )
    own_guidance = GUIDANCE.get(config.pretrained_model_name_or_path, family.GUIDANCE)
    config = replace(
        config,
        mixed_precision=accelerator.mixed_precision,
        resolution=config.resolution or family.native_resolution,
        learning_rate=config.resolved_learning_rate,
        targets=family.CONTROL_TARGETS if config.targets is None else config.targets,
        sampler=config.sampler or family.SAMPLER,
        num_inference_steps=config.num_inference_steps or family.STEPS,
        guidance_scale=own_guidance if config.guidance_scale is None else config.guidance_scale,
    )
    check_resolution(int(config.resolution or 0), family.divisor)
    if accelerator.is_main_process:
        _compare_resolutions(config, family)
    hashes = base_hashes(family.pipe)
    if checkpoint and accelerator.is_main_process:
        for change in changed_settings(config.run, hashes):
            logger.warning("resuming with another setting, %s", change)
    beside = None if config.training_adapter is None else load_training_adapter(family, config.training_adapter)
    file = _base_file(config) if accelerator.is_main_process else None
    if config.base_quantization is not None:
        quantize(family.denoiser, config.base_quantization, accelerator.device)
    return Start(config, accelerator, family, checkpoint, hashes, training_adapter=beside, base_file=file)


def _base_file(config: TrainingConfig) -> dict[str, str] | None:
    """Name and SHA-256 of a base in a single file, not where it is."""
    if config.base_config is None:
        return None
    file = Path(config.pretrained_model_name_or_path)
    return {"name": file.name, "sha256": sha256(file)}


def _compare_resolutions(config: TrainingConfig, family: Family) -> None:
    """Warn of a resolution that is far from the base's own."""
    resolution, native = int(config.resolution or 0), family.native_resolution
    if not native / FAR <= resolution <= FAR * native:
        logger.warning(
            "resolution is %d pixels, the base %s draws %d: so far from its own size a base learns and draws badly; "
            "leave --resolution out, or pass --resolution %d",
            resolution,
            config.pretrained_model_name_or_path,
            native,
            native,
        )


def record_start(
    start: Start[Any], trainables: list[Trainable], facts: Mapping[str, Any], config: TrainingConfig | None = None
) -> Provenance:
    """What will stand in a run folder, written by :meth:`Start.begin`; ``facts`` are the program's own.

    ``config``: of one of several trainings side by side, whose folder it is.
    """
    config, accelerator = config or start.config, start.accelerator
    chunks = start.family.settings.prompt_chunks
    provenance = Provenance(
        config.run,
        now := {
            "family": start.family.NAME,
            "base_hash": start.base_hash,
            "device": str(accelerator.device),
            "threads": torch.get_num_threads(),
            "num_processes": accelerator.num_processes,
            "trained_parameters": {trainable.component: trainable.num_parameters() for trainable in trainables},
            **({"prompt_chunks": chunks} if chunks > 1 else {}),
            **({"training_adapter": start.training_adapter.hash} if start.training_adapter else {}),
            **({"base_model": start.base_file["name"], "base_file": start.base_file} if start.base_file else {}),
            **facts,
        },
        resumed=start.checkpoint is not None,
    )
    if start.checkpoint and accelerator.is_main_process:
        for change in changed_facts(read_provenance(config.output_dir), now):
            logger.warning("resuming with another %s: the result is not that of the uninterrupted run", change)
    start.records.append((provenance, config))
    return provenance
