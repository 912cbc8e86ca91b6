"""Optimisers and learning rate schedules by name."""

from __future__ import annotations

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch.optim.lr_scheduler import LRScheduler

from ether_diffusion.training.config import TrainingConfig
from ether_diffusion.training.trainables import Trainable

FUSED_ON = ("cpu", "cuda")
"""Devices for which torch has a fused AdamW that is tested here."""


def make_optimizer(trainables: list[Trainable], config: TrainingConfig) -> torch.optim.Optimizer:
    """One parameter group per component, named by it, with its own learning rate.

    AdamW is torch's fused one where all parameters allow it: its loop over hundreds of small tensors is not in Python.
    A resumed run goes on with the one that its checkpoint names. Not in fp16: there the fused one would look at the
    overflows itself, and hide skipped steps from the loop.

    Raises:
        ImportError: the optimiser's package is not installed.
    """
    rate = config.resolved_learning_rate
    groups = [{"params": t.parameters(), "lr": config.rate_of(t.component), "component": t.key} for t in trainables]
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "adamw":
        parameters = [parameter for trainable in trainables for parameter in trainable.parameters()]
        fused = config.mixed_precision != "fp16" and all(p.device.type in FUSED_ON for p in parameters)
        return torch.optim.AdamW(
            groups,
            lr=rate,
            betas=betas,
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=fused or None,
        )
    if config.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(
            groups, lr=rate, betas=betas, weight_decay=config.adam_weight_decay, eps=config.adam_epsilon
        )
    import prodigyopt

    return prodigyopt.Prodigy(
        groups, lr=rate, betas=betas, weight_decay=config.adam_weight_decay, eps=config.adam_epsilon
    )


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> LRScheduler:
    """The learning rate schedule of diffusers that the config names, counted in optimisation steps."""
    schedule: LRScheduler = get_scheduler(
        SchedulerType(config.lr_scheduler),
        optimizer,
        step_rules=config.lr_step_rules,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    return schedule


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The current learning rate of every component."""
    return {group["component"]: float(group["lr"]) for group in optimizer.param_groups}
