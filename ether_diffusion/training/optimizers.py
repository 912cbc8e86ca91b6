"""Optimisers and learning rate schedules by name."""

from __future__ import annotations

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch.optim.lr_scheduler import LRScheduler

from ether_diffusion.training.sections import OptimizerSection
from ether_diffusion.training.trainables import Trainable

FUSED_ON = ("cpu", "cuda")
"""Devices for which torch has a fused AdamW that is tested here."""


def make_optimizer(trainables: list[Trainable], section: OptimizerSection) -> torch.optim.Optimizer:
    """One parameter group per component, named by it, with its own learning rate.

    AdamW is torch's fused one where all parameters allow it: its loop over hundreds of small tensors is not in Python.
    A resumed run goes on with the one that its checkpoint names. Not in fp16: there the fused one would look at the
    overflows itself, and hide skipped steps from the loop.

    Raises:
        ImportError: the optimiser's package is not installed.
    """
    rate = section.resolved_learning_rate
    groups = [{"params": t.parameters(), "lr": section.rate_of(t.component), "component": t.key} for t in trainables]
    betas = (section.adam_beta1, section.adam_beta2)
    if section.optimizer == "adamw":
        parameters = [parameter for trainable in trainables for parameter in trainable.parameters()]
        fused = section.mixed_precision != "fp16" and all(p.device.type in FUSED_ON for p in parameters)
        return torch.optim.AdamW(
            groups,
            lr=rate,
            betas=betas,
            weight_decay=section.adam_weight_decay,
            eps=section.adam_epsilon,
            fused=fused or None,
        )
    if section.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(
            groups, lr=rate, betas=betas, weight_decay=section.adam_weight_decay, eps=section.adam_epsilon
        )
    import prodigyopt

    return prodigyopt.Prodigy(
        groups, lr=rate, betas=betas, weight_decay=section.adam_weight_decay, eps=section.adam_epsilon
    )


def make_schedule(optimizer: torch.optim.Optimizer, section: OptimizerSection) -> LRScheduler:
    """The learning rate schedule of diffusers that the section names, counted in optimisation steps."""
    schedule: LRScheduler = get_scheduler(
        SchedulerType(section.lr_scheduler),
        optimizer,
        step_rules=section.lr_step_rules,
        num_warmup_steps=section.lr_warmup_steps,
        num_training_steps=section.max_train_steps,
        num_cycles=section.lr_num_cycles,
        power=section.lr_power,
    )
    return schedule


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The current learning rate of every component."""
    return {group["component"]: float(group["lr"]) for group in optimizer.param_groups}
