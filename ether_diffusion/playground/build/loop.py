"""The one training loop of all stages: resumable bit for bit, within steps and minutes, with averaged weights.

Several processes (``python -m torch.distributed.run --nproc_per_node=N -m ether_diffusion.playground.build``) share
each batch: every one draws its own part, the gradients are averaged, and the first keeps time and checkpoints.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ether_diffusion.data.randomness import generator
from ether_diffusion.files import atomic_path
from ether_diffusion.playground.build.presets import Training

Curve = list[tuple[int, float]]


class Stage(ABC):
    """What a stage adds to the loop.

    Attributes:
        name: one of ``STAGES``.
        network: all that is trained or remembered between steps; its state is what a checkpoint holds.
        device: where the network and the data are.
        training: how long and how fast.
    """

    name: str
    network: nn.Module
    device: torch.device
    training: Training

    @abstractmethod
    def loss(self, dice: torch.Generator) -> Tensor:
        """The loss of one batch, scalar; every draw comes from ``dice``, a generator on the stage's device."""

    def validation(self, network: nn.Module) -> Tensor | None:
        """The loss of ``network``, of this stage's class, on fixed held-out data, scalar; None for a stage without."""
        return None

    @abstractmethod
    def start_from(self, folder: Path) -> None:
        """Take the weights of the finished build in ``folder``, and freeze what its other models were trained with."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the finished model to ``folder``."""

    def rows(self, size: int, dice: torch.Generator) -> Tensor:
        """This process's part of a batch of row numbers below ``size``, int64."""
        part = self.training.batch // PartialState().num_processes
        return torch.randint(size, (part,), generator=dice, device=self.device)


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights into a model of the same architecture, in the target's dtype.

    Raises:
        RuntimeError: the architectures differ.
    """
    target.load_state_dict(source.state_dict())


class Trained(NamedTuple):
    """What a finished training was.

    Attributes:
        curve: (step, mean loss since the last point).
        validation: (step, loss of the averaged weights on fixed data), of a stage that has one.
        steps: optimizer steps in all.
        seconds: what they took in all.
    """

    curve: Curve
    validation: Curve
    steps: int
    seconds: float


def train(stage: Stage, folder: Path, seed: int) -> Trained:
    """Train the stage from its last checkpoint in ``folder`` to the end and leave the averaged weights in it.

    Raises:
        RuntimeError: the loss is not finite.
        ValueError: the batch cannot be divided among the processes.
    """
    training, network, device, processes = stage.training, stage.network, stage.device, PartialState()
    if training.batch % processes.num_processes:
        raise ValueError(f"{stage.name}: a batch of {training.batch} is not to be shared by {processes.num_processes}")
    average = copy.deepcopy(network).requires_grad_(False) if training.ema else None
    groups, fused = _groups(network, training.weight_decay), device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=training.lr, betas=(0.9, 0.99), fused=fused)
    step, seconds, curve, validation = 0, 0.0, Curve(), Curve()
    recent = torch.zeros((), device=device)
    path = folder / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        step, seconds, curve, recent = state["step"], state["seconds"], state["curve"], state["recent"]
        validation = state["validation"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])

    def save() -> None:
        state: dict[str, object] = {"step": step, "seconds": seconds, "curve": curve, "recent": recent}
        state |= {"validation": validation}
        state |= {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {} if average is None else {"average": average.state_dict()}
        if processes.is_main_process:
            with atomic_path(path) as temporary:
                torch.save(state, temporary)

    network.train()
    bar = tqdm(
        total=training.steps,
        initial=step,
        desc=stage.name,
        unit="step",
        mininterval=2,
        disable=not processes.is_main_process,
    )
    while (progress := _progress(training, step, seconds)) < 1:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = training.lr * _warmth(training, step, progress)
        recent += _step(stage, optimizer, step_generator(seed, stage.name, step, device, processes.process_index))
        step += 1
        if average is not None:
            _follow(average, network, min(training.ema, (1 + step) / (10 + step)))
        if step % training.log_every == 0:
            curve.append((step, _mean(recent, training.log_every, stage.name, step)))
            recent.zero_()
            bar.set_postfix(loss=f"{curve[-1][1]:.4f}")
        if step % training.validate_every == 0 and (value := stage.validation(average or network)) is not None:
            validation.append((step, value.item()))
            if processes.is_main_process:
                bar.write(f"{stage.name}: step {step}, loss on fixed noise {validation[-1][1]:.4f}")
        seconds = _first(seconds + time.perf_counter() - start)
        if step % training.save_every == 0:
            save()
        bar.update()
    bar.close()
    save()
    if average is not None:
        network.load_state_dict(average.state_dict())
    network.eval()
    return Trained(curve, validation, step, seconds)


def step_generator(seed: int, stage: str, step: int, device: torch.device, process: int = 0) -> torch.Generator:
    """A generator on ``device`` that is a pure function of the other arguments."""
    key = (seed, stage, step, process) if process else (seed, stage, step)
    return torch.Generator(device).manual_seed(generator(*key).initial_seed())


def _step(stage: Stage, optimizer: torch.optim.Optimizer, dice: torch.Generator) -> Tensor:
    cuda = stage.device.type == "cuda"
    bf16 = stage.training.bf16 or cuda
    with torch.autocast(stage.device.type, torch.bfloat16, enabled=bf16), nullcontext() if cuda else Fp32Attention():
        loss = stage.loss(dice)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    _average([parameter.grad for parameter in stage.network.parameters() if parameter.grad is not None])
    torch.nn.utils.clip_grad_norm_(stage.network.parameters(), 1.0)
    optimizer.step()
    return loss.detach().float()


ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""The arguments of ``scaled_dot_product_attention`` that may be given by place."""


class Fp32Attention(TorchFunctionMode):
    """Attention in fp32 amid autocast: the backward of torch's CPU kernel is six times slower in bf16 than in fp32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, and if it is attention, run it in fp32 and return the dtype of the query."""
        if func is not F.scaled_dot_product_attention or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        given = dict(zip(ATTENTION, args, strict=False)) | (kwargs or {})
        dtype = given["query"].dtype
        given |= {name: given[name].float() for name in ATTENTION[:3]}
        with torch.autocast("cpu", enabled=False):
            seen: Tensor = func(**given)
        return seen.to(dtype)


def _average(gradients: list[Tensor]) -> None:
    """Replace the gradients by their means over the processes, in one message."""
    if PartialState().num_processes == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= PartialState().num_processes
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _first(seconds: float) -> float:
    """The first process's value, so that all end at the same step."""
    if PartialState().num_processes == 1:
        return seconds
    values = [seconds]
    dist.broadcast_object_list(values)
    return values[0]


def _mean(total: Tensor, count: int, name: str, step: int) -> float:
    value = total.item() / count
    if not math.isfinite(value):
        raise RuntimeError(f"{name}: the loss is {value} at step {step}: delete its checkpoint and lower --lr {name}=…")
    return value


def _progress(training: Training, step: int, seconds: float) -> float:
    if step >= training.steps:  # none at all, for a model that was trained before
        return 1.0
    spent = seconds / (60 * training.minutes) if training.minutes else 0.0
    return min(max(step / training.steps, spent), 1.0)


def _warmth(training: Training, step: int, progress: float) -> float:
    """Share of the peak learning rate: linear warmup, then a cosine to 1%."""
    return min((step + 1) / training.warmup, 1.0) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """No decay for vectors and embeddings: it would shrink the tokens that no caption holds."""
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in network.parameters() if p.requires_grad]
    free = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    held = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    return [{"params": held, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for kept, buffer in zip(average.buffers(), network.buffers(), strict=True):
        kept.copy_(buffer)
