"""Checkpoints from which a run continues as if it had never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ether_diffusion.core.adapter import Adapter
from ether_diffusion.core.state import state_problems
from ether_diffusion.files import commit
from ether_diffusion.runs.folder import list_checkpoints, remove_checkpoints, step_of
from ether_diffusion.training.sections import SavingSection
from ether_diffusion.training.trainables import ADAPTER_NAME, Trainable, save_adapter

WEIGHTS = "trained.safetensors"


class Checkpoints:
    """Saves and restores a run: the trained weights, optimiser, schedule, gradient scaler and random states.

    Of the model only what is trained is written; adapters of this library also as the file that
    :func:`ether_diffusion.load` reads, so that every checkpoint can be tried in a pipeline. All processes must call
    :meth:`save` and :meth:`load`.

    Args:
        accelerator: holds the optimiser and what is registered with it.
        pipe: the pipeline in training.
        trainables: what is trained in it.
        saving: where the run folder is and how many checkpoints to keep.
    """

    def __init__(
        self, accelerator: Accelerator, pipe: DiffusionPipeline, trainables: list[Trainable], saving: SavingSection
    ) -> None:
        self.accelerator = accelerator
        self.pipe = pipe
        self.trainables = trainables
        self.saving = saving
        self.folder = saving.output_dir / "checkpoints"
        if accelerator.is_main_process:
            for leftover in self.folder.glob(".step-*"):  # of a process that was killed while it saved
                shutil.rmtree(leftover)
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

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
            commit(temporary, path)
            if self.saving.checkpoints_total_limit is not None:
                remove_checkpoints(list_checkpoints(self.folder)[: -max(1, self.saving.checkpoints_total_limit)])
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> int:
        """Restore the checkpoint at ``path`` and return its step.

        Raises:
            ValueError: the checkpoint does not fit what this run trains.
        """
        self.accelerator.load_state(str(path))
        return step_of(path)

    def _save_weights(self, models: object, weights: list[object], folder: str) -> None:
        weights.clear()  # Accelerate would write the frozen base as well
        if self.accelerator.is_main_process:
            state = {key: value.detach().cpu().contiguous() for key, value in self._state().items()}
            (Path(folder) / WEIGHTS).write_bytes(serialize(state))
            for name in dict.fromkeys(trainable.adapter for trainable in self.trainables):
                own = Path(folder) if name == ADAPTER_NAME else Path(folder) / name
                save_adapter(self.pipe, name, self.saving.pretrained_model_name_or_path, own)

    def _load_weights(self, models: list[object], folder: str) -> None:
        models.clear()
        state = self._state()
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        problems = state_problems(saved, state, unit_vectors=False)
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
        for key, value in state.items():
            value.data.copy_(saved[key])

    def _state(self) -> dict[str, Tensor]:
        return {
            f"{trainable.key}.{name}": parameter
            for trainable in self.trainables
            for name, parameter in trainable.module.named_parameters()
            if parameter.requires_grad
        }


def _zero_vectors(saved: dict[str, Tensor], prefix: str) -> list[str]:
    """What is wrong with an adapter's vectors themselves."""
    vectors = {key: value for key, value in saved.items() if key.startswith(prefix)}
    return state_problems(vectors, vectors)
