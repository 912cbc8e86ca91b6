"""The sections of a training's settings: each part of a program is handed its own, not the whole.

Flags and YAML stay flat; :meth:`~ether_diffusion.training.config.TrainingConfig.section` takes a section out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.config import EtherConfig
from ether_diffusion.registry import MethodEntry


@dataclass(frozen=True)
class BaseSection:
    """The frozen base; ``entry`` and ``train_text_encoder`` say which of its parts are trained themselves.

    ``chosen`` are settings that only some families have.
    """

    pretrained_model_name_or_path: str
    base_config: str | None
    revision: str | None
    variant: str | None
    entry: MethodEntry
    train_text_encoder: bool
    chosen: frozenset[str]


@dataclass(frozen=True)
class AdapterSection:
    """What is trained, and on which projections."""

    entry: MethodEntry
    n_blocks: int
    initial_length: float
    two_sided: bool
    rank: int
    peft_config: Mapping[str, Any] | None
    target_patterns: str | tuple[str, ...]
    seed: int
    train_text_encoder: bool

    def targets_of(self, component: str) -> str | tuple[str, ...]:
        """The projections of a component: text encoders, which have no GEGLU, are without it what the denoiser is."""
        if component.startswith("text_encoder") and self.target_patterns in (
            "attention+geglu",
            "attention+geglu_input",
        ):
            return "attention"
        return self.target_patterns

    def ether_config(self, component: str = "") -> EtherConfig:
        """The same for an adapter of this library, on that component."""
        return EtherConfig(self.entry.name, self.n_blocks, self.two_sided, self.targets_of(component), self.seed)


TOKENS = "tokens."
"""What the names of trained components begin with that are rows of a placeholder token; a text encoder follows."""


@dataclass(frozen=True)
class NewTokenSection:
    """The placeholder token that is trained beside the adapter."""

    placeholder_token: str | None
    initializer_token: str | None
    num_vectors: int
    token_steps: int | None
    seed: int


@dataclass(frozen=True)
class OptimizerSection:
    """Optimiser and schedule; ``rate_of`` is from a component to its learning rate."""

    optimizer: str
    mixed_precision: str | None
    resolved_learning_rate: float
    rate_of: Callable[[str], float]
    adam_beta1: float
    adam_beta2: float
    adam_weight_decay: float
    adam_epsilon: float
    lr_scheduler: str
    lr_warmup_steps: int
    lr_num_cycles: int
    lr_power: float
    lr_step_rules: str | None
    max_train_steps: int


@dataclass(frozen=True)
class ComputeSection:
    """Precision, processes, memory and trackers, and what the packages that must be installed depend on."""

    entry: MethodEntry
    optimizer: str
    resolved_learning_rate: float
    guessed_rate: bool
    output_dir: Path
    seed: int
    train_text_encoder: bool
    encodes_prompts: bool
    mixed_precision: str | None
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    allow_tf32: bool
    torch_compile: bool
    report_to: list[str]
    base_quantization: str | None


@dataclass(frozen=True)
class SampleSection:
    """Sample grids."""

    output_dir: Path
    resolution: int | None
    sampler: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    num_validation_images: int
    validation_seed: int


@dataclass(frozen=True)
class ChoosingSection:
    """Who scores the samples of which method, and after how many scored steps without a better one the run ends."""

    output_dir: Path
    entry: MethodEntry
    dino: str | None
    clip: str | None
    early_stopping: int | None


@dataclass(frozen=True)
class SavingSection:
    """What is written, and where."""

    output_dir: Path
    entry: MethodEntry
    pretrained_model_name_or_path: str
    checkpoints_total_limit: int | None
    export_lora: str | None


@dataclass(frozen=True)
class LoopSection:
    """The steps of the loop, and when it saves and samples."""

    output_dir: Path
    max_train_steps: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    ema_decay: float | None
    checkpointing_steps: int
    validation_steps: int
    num_validation_images: int


@dataclass(frozen=True)
class HubSection:
    """The upload; ``private_conditions``: whether the conditions of the samples come from the user's own pairs."""

    output_dir: Path
    push_to_hub: bool
    hub_private: bool
    hub_model_id: str | None
    private_conditions: bool


@dataclass(frozen=True)
class BatchSection:
    """Batches and their noise."""

    seed: int
    train_batch_size: int
    gradient_accumulation_steps: int
    dataloader_num_workers: int
    noise_offset: float

    def batch_size(self, num_processes: int) -> int:
        """Samples of an optimisation step, of all processes and rounds."""
        return self.train_batch_size * num_processes * self.gradient_accumulation_steps


@dataclass(frozen=True)
class ControlSection:
    """The way of control."""

    control: str
    condition: str
    canny_low: int
    canny_high: int
    has_maps: bool
    seed: int
    pretrained_model_name_or_path: str
    controlnet_model_name_or_path: str | None
    train_controlnet: str | None
