"""Checkpoints from which a run continues as if it had never stopped."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ether_diffusion.core.adapter import Adapter
from ether_diffusion.core.state import state_problems
from ether_diffusion.files import commit_beside
from ether_diffusion.pipelines.file import first_line
from ether_diffusion.runs.checksums import CHECKSUMS, write_checksums
from ether_diffusion.runs.folder import list_checkpoints, remove_checkpoints, remove_doomed, step_of
from ether_diffusion.runs.written import note_written
from ether_diffusion.training.averages import Averages
from ether_diffusion.training.choosing import Choosing
from ether_diffusion.training.saved_state import read_saved, unlike
from ether_diffusion.training.sections import SavingSection
from ether_diffusion.training.trainables import ADAPTER_NAME, Trainable, save_adapter, trained_state

logger = logging.getLogger(__name__)

WEIGHTS = "trained.safetensors"
AVERAGES = "averaged.safetensors"
"""The trained weights of the last step, and their moving average, where a run keeps one."""
OPTIMIZER = "optimizer.bin"
SCHEDULE = "custom_checkpoint_0.pkl"
SCALER = "scaler.pt"
"""Names that Accelerate gives to what it saves; in spite of them all are files of ``torch.save``."""


class Stateful(Protocol):
    """An optimiser, a schedule or a gradient scaler."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Take the state over."""

    def state_dict(self) -> dict[str, Any]:
        """The present state."""


class Checkpoints:
    """Saves and restores a run: trained weights, their average, optimiser, schedule, gradient scaler, random states.

    Of the model only what is trained is written; adapters of this library also as the file that
    :func:`ether_diffusion.load` reads, averaged if there is an average, so that every checkpoint can be tried. All
    processes must call :meth:`save` and :meth:`load`.

    Args:
        accelerator: holds the optimiser and what is registered with it.
        pipe: the pipeline in training.
        trainables: what is trained in it.
        saving: where the run folder is and how many checkpoints to keep.
        averages: of what is trained, where the run keeps them.
        chosen: by the name of an adapter, what keeps its best step, which every checkpoint holds too.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipe: DiffusionPipeline,
        trainables: list[Trainable],
        saving: SavingSection,
        averages: Averages | None = None,
        chosen: Mapping[str, Choosing] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.pipe = pipe
        self.trainables = trainables
        self.saving = saving
        self.averages = averages
        self.chosen = {} if chosen is None else dict(chosen)
        self.folder = saving.output_dir / "checkpoints"
        accelerator.register_save_state_pre_hook(self._save_weights)

    def remove_leftovers(self) -> None:
        """Remove what a process left half written, or half removed, that was killed meanwhile."""
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(leftover)
            for doomed in self.folder.glob(".step-*.old"):
                remove_doomed(doomed)

    def save(self, step: int) -> None:
        """Write ``checkpoints/step-…`` under another name, sync it, rename it; then drop the oldest over the limit."""
        path = self.folder / f"step-{step:06d}"
        temporary = self.folder / f".step-{step:06d}.tmp"
        if self.accelerator.is_main_process and temporary.exists():
            shutil.rmtree(temporary)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_checksums(temporary)
            files = sorted(
                (file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file()),
                key=lambda file: file.name == CHECKSUMS,  # last
            )
            note_written(self.saving.output_dir, [path / file for file in files])
            commit_beside(temporary, path, files)
            if self.saving.checkpoints_total_limit is not None:
                remove_checkpoints(list_checkpoints(self.folder)[: -max(1, self.saving.checkpoints_total_limit)])
        self.accelerator.wait_for_everyone()

    def load(self, path: Path, optimizer: Stateful, schedule: Stateful) -> int:
        """Restore the checkpoint at ``path`` and return its step. Everything is read before anything is restored.

        Accelerate's own ``load_state`` is not used: it unpickles the schedule. Here every file is safetensors, or read
        by :func:`~ether_diffusion.training.saved_state.read_saved`.

        Raises:
            FileNotFoundError: a file of the checkpoint is missing.
            ValueError: the checkpoint is damaged, or does not fit what this run trains.
        """
        weights = self._read_weights(path, WEIGHTS)
        averaged = self._read_averages(path, weights)
        parts: list[tuple[Stateful, Path, dict[str, Any]]] = [
            (optimizer, path / OPTIMIZER, self._read_optimizer(path / OPTIMIZER, optimizer)),
            (schedule, path / SCHEDULE, _read_like(path / SCHEDULE, schedule)),
        ]
        if self.accelerator.scaler is not None:
            parts.append((self.accelerator.scaler, path / SCALER, _read_like(path / SCALER, self.accelerator.scaler)))
        own = path / f"random_states_{self.accelerator.process_index}.pkl"
        randomness = _read_random(own) if own.is_file() else None
        for part, file, state in parts:
            try:
                part.load_state_dict(state)
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{file} is refused: it does not fit this run's ({first_line(error)})") from error
        for key, value in trained_state(self.trainables).items():
            value.data.copy_(weights[key])
        if self.averages is not None:
            self.averages.load(averaged)
        if randomness is not None:
            self.accelerator.step = randomness["step"]
            _restore_random(randomness)
        else:  # more processes than before; only dropout draws from the global generators
            logger.warning("%s has no %s: this process's random generators start anew", path, own.name)
        return step_of(path)

    def _read_optimizer(self, path: Path, optimizer: Stateful) -> dict[str, Any]:
        """The optimiser's state, of whose moments each has the shape of its parameter.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not the state of such an optimiser.
        """
        state, own = read_saved(path), optimizer.state_dict()
        groups, values = state.get("param_groups"), state.get("state")
        if not isinstance(groups, list) or not isinstance(values, dict):
            raise ValueError(f"{path} is refused: it is no state of an optimiser")
        parameters = [parameter for group in _groups(optimizer) for parameter in group["params"]]
        like = [{key: value for key, value in group.items() if key != "betas"} for group in own["param_groups"]]
        wrong = unlike(groups, like, "param_groups") if len(groups) == len(like) else None  # torch says what differs
        for number, parameter in enumerate(parameters):
            moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter) | {"step": 0.0}
            found = values.get(number, {})
            if isinstance(found, dict) and isinstance(found.get("step"), Tensor):
                moments["step"] = torch.zeros(())
            wrong = wrong or unlike(found, moments, f"state.{number}")
        if wrong:
            raise ValueError(f"{path} is refused: {wrong}")
        return state

    def _save_weights(self, models: object, weights: list[object], folder: str) -> None:
        weights.clear()  # Accelerate would write the frozen base as well
        if self.accelerator.is_main_process:
            _write(Path(folder) / WEIGHTS, trained_state(self.trainables))
            if self.averages is not None:
                _write(Path(folder) / AVERAGES, self.averages.values)
            with nullcontext() if self.averages is None else self.averages.acting():
                for name in dict.fromkeys(trainable.adapter for trainable in self.trainables):
                    self.save_adapter(name, adapter_folder(Path(folder), name))
            for name, choosing in self.chosen.items():
                choosing.store(adapter_folder(Path(folder), name))

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write an adapter as it is now into a folder; nothing of methods whose result is none of this library's."""
        save_adapter(self.pipe, name, self.saving.pretrained_model_name_or_path, folder)

    def _read_averages(self, folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The averages of a checkpoint; where it has none, its weights, with which the average begins.

        Raises:
            ValueError: they do not fit this run's, or the file is damaged.
        """
        if self.averages is None:
            return {}
        if (folder / AVERAGES).is_file():
            return self._read_weights(folder, AVERAGES)
        logger.warning("%s has no %s: the average begins with the weights of that step", folder, AVERAGES)
        return weights

    def _read_weights(self, folder: Path, name: str) -> dict[str, Tensor]:
        """The trained weights of a checkpoint, or their average, which fit this run's.

        Raises:
            FileNotFoundError: the checkpoint has no such file.
            ValueError: they do not fit, or the file is damaged.
        """
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the checkpoint is incomplete")
        try:
            with safe_open(path, framework="pt") as file:
                saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {first_line(error)}") from error
        problems = state_problems(saved, trained_state(self.trainables), unit_vectors=False)
        problems += [
            problem
            for trainable in self.trainables
            if isinstance(trainable.module, Adapter)  # a fresh LoRA is zero, and may be
            for problem in _zero_vectors(saved, f"{trainable.key}.")
        ]
        if problems:
            raise ValueError(
                f"the checkpoint {folder} does not fit this run's method or targets:\n" + "\n".join(problems)
            )
        return saved


def adapter_folder(checkpoint: Path, name: str) -> Path:
    """Where a checkpoint has an adapter: in a folder of its name, or in the checkpoint itself if there is but one."""
    return checkpoint if name == ADAPTER_NAME else checkpoint / name


def _write(path: Path, state: Mapping[str, Tensor]) -> None:
    path.write_bytes(serialize({key: value.detach().cpu().contiguous() for key, value in state.items()}))


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = optimizer.param_groups
    return groups


def _read_like(path: Path, part: Stateful) -> dict[str, Any]:
    """A saved state of the part's kind, without keys that the part does not have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind.
    """
    found, own = read_saved(path), part.state_dict()
    if wrong := unlike(found, own):
        raise ValueError(f"{path} is refused: {wrong}")
    return {key: value for key, value in found.items() if key in own}


def _read_random(path: Path) -> dict[str, Any]:
    """The saved states of the random generators, each tried out on one of its own.

    Raises:
        ValueError: one is no such state.
    """
    states = read_saved(path)
    try:
        random.Random().setstate(states["random_state"])
        np.random.RandomState().set_state(states["numpy_random_seed"])
        torch.Generator().set_state(states["torch_manual_seed"])
        step = states["step"]
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is refused: it holds no states of random generators ({first_line(error)})") from error
    if wrong := unlike(step, 0, "step"):
        raise ValueError(f"{path} is refused: {wrong}")
    return states


def _zero_vectors(saved: dict[str, Tensor], prefix: str) -> list[str]:
    """What is wrong with an adapter's vectors themselves."""
    vectors = {key: value for key, value in saved.items() if key.startswith(prefix)}
    return state_problems(vectors, vectors)


def _restore_random(states: Mapping[str, Any]) -> None:
    """Set the global random generators to what Accelerate saved of them."""
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    for kind, devices in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        saved = states.get(f"torch_{kind}_manual_seed")
        if saved is not None and devices.is_available() and len(saved) == devices.device_count():
            devices.set_rng_state_all(saved)
