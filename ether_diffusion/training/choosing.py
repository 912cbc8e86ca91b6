"""The best step of a run, found while it trains: its samples are scored, and the best adapter is kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from ether_diffusion.files import atomic_path
from ether_diffusion.metrics.judges import load_judges
from ether_diffusion.metrics.scoring import Judges, References
from ether_diffusion.pipelines.file import ADAPTER_FILES
from ether_diffusion.runs.choosing import BEST, SAMPLE_SCORES, best_step, steps_since_best
from ether_diffusion.runs.folder import MetricsFile
from ether_diffusion.runs.record import BEST_FILE, read_run
from ether_diffusion.runs.sample_scores import references_of, score_step
from ether_diffusion.runs.scores import public_identity
from ether_diffusion.runs.written import note_written
from ether_diffusion.training.placement import present
from ether_diffusion.training.sections import ChoosingSection

logger = logging.getLogger(__name__)


def judges_for(section: ChoosingSection) -> Judges | None:
    """The judges that the settings name, on the CPU until they are used; None where they name none.

    Raises:
        ImportError: a package is missing.
        OSError: a model cannot be loaded.
    """
    return None if section.dino is None or section.clip is None else load_judges(section.dino, section.clip)


class Choosing:
    """Scores the sample grids of one run and keeps the adapter of its best step in ``best/``.

    Every checkpoint holds the best adapter up to then, so that a resumed run goes on with the right one. Of a method
    whose result is no adapter file of this library there are the scores alone.

    Args:
        section: the run folder, the method, and after how many scored steps without a better one the run ends.
        judges: who scores.
        device: where they compute.
    """

    def __init__(self, section: ChoosingSection, judges: Judges, device: torch.device) -> None:
        self.folder = section.output_dir
        self.keeps = section.entry.is_own
        self.patience = section.early_stopping
        self.judges = judges
        self.device = device
        self.kept: int | None = None
        """The step of the adapter in ``best/``."""
        self.waited = 0
        """Scored steps since the best one."""

    @property
    def file(self) -> Path:
        """The adapter file of the best step."""
        return self.folder / BEST_FILE

    @property
    def files(self) -> dict[str, int]:
        """The adapter file of the best step, relative to the run folder, with the step; empty where there is none."""
        return {BEST_FILE: self.kept} if self.kept is not None and self.file.is_file() else {}

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end, by early stopping."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def facts(self) -> dict[str, object]:
        """Who judges, for the run's record."""
        return {"sample_judges": public_identity(self.judges)}

    @cached_property
    def references(self) -> References:
        """The subject's own pictures; looked at once, when the first samples are scored."""
        return references_of(read_run(self.folder), self.judges)

    def begin(self, checkpoint: Path | None, step: int, save: Callable[[Path], None]) -> None:
        """Go on from a checkpoint with the best adapter up to it; later rows and a later best are forgotten.

        Args:
            checkpoint: the folder of this run's adapter in it; None for a new run.
            step: of the checkpoint; its weights are the present ones.
            save: writes the present adapter into a folder.
        """
        MetricsFile(self.folder / SAMPLE_SCORES, step)  # without the rows after the step
        rows = read_run(self.folder).sample_scores
        best, self.waited = best_step(rows), steps_since_best(rows)
        self.kept = None
        if not self.keeps:
            return
        if best is not None and best == step:
            self._keep(step, save)
        elif best is not None and checkpoint is not None and (checkpoint / BEST_FILE).is_file():
            self._note()
            _copy_adapter(checkpoint / BEST, self.file.parent)
            self.kept = best
        else:
            for name in ADAPTER_FILES:
                (self.file.parent / name).unlink(missing_ok=True)
            if best is not None:
                logger.warning(
                    "%s has no adapter of the best step, %d: a later one may take its place", checkpoint, best
                )

    def look(self, step: int, save: Callable[[Path], None]) -> None:
        """Score the samples of a step that have no score yet, and those of the base; keep the adapter if it is best.

        Running out of memory costs the scores of the step, not the run.
        """
        try:
            self._score(step)
        except (torch.OutOfMemoryError, MemoryError) as error:
            logger.warning("out of memory while scoring step %d; training goes on without its scores (%s)", step, error)
            return
        rows = read_run(self.folder).sample_scores
        self.waited = steps_since_best(rows)
        if self.keeps and best_step(rows) == step != self.kept:
            self._keep(step, save)

    def store(self, folder: Path) -> None:
        """Put the best adapter into a checkpoint.

        Args:
            folder: of this run's adapter in the checkpoint.
        """
        if self.files:
            _copy_adapter(self.file.parent, folder / BEST)

    def _score(self, step: int) -> None:
        run = read_run(self.folder)
        known = {row["step"] for row in run.sample_scores}
        due = [at for at in dict.fromkeys((0, step)) if at in run.sample_steps and at not in known]
        if not due:
            return
        file = MetricsFile(self.folder / SAMPLE_SCORES, step)
        with present(self.device, self.judges.dino.model, self.judges.clip.model):
            for at in due:
                file.append(score_step(run, at, self.references, self.judges))

    def _keep(self, step: int, save: Callable[[Path], None]) -> None:
        self._note()
        save(self.file.parent)
        self.kept = step

    def _note(self) -> None:
        """Claim the files of the best adapter; the second is there where it has a placeholder token."""
        note_written(self.folder, [self.file.parent / name for name in ADAPTER_FILES])


def _copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter from one folder to another: embeddings first, which the adapter names."""
    for name in reversed(ADAPTER_FILES):
        if (source / name).is_file():
            with atomic_path(target / name) as temporary:
                shutil.copyfile(source / name, temporary)
