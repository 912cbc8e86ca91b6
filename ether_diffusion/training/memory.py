"""What a training takes of a device's memory: computed from the model's settings on the meta device, not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.host import attach
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.quantization import is_quantizable
from ether_diffusion.families.settings import Quantization
from ether_diffusion.page.text import markdown_table
from ether_diffusion.registry import title_of
from ether_diffusion.training.config import TrainingConfig

GIBIBYTE = 2**30
BITS: dict[Quantization, float] = {"nf4": 4 + 32 / 64, "int8": 8, "fp8-storage": 8}
"""Of a quantised weight: nf4 keeps a number of 32 bits for each block of 64."""
OPTIMIZER_STATES = {"adamw": 8.0, "adamw8bit": 2.0, "prodigy": 16.0}
"""Bytes for each trained number beside itself and its gradient."""


@dataclass(frozen=True)
class Plan:
    """Bytes of a training step, by what holds them.

    Attributes:
        parameters: of the denoiser.
        base: the denoiser's weights as they are kept.
        trained: the adapter and its gradients, fp32.
        optimizer: its states.
        activations: what the forward keeps for the backward; with checkpointing the inputs of the blocks, and what the
            largest block keeps is not counted. None where the forward asks for values, which the meta device has not.
    """

    parameters: int
    base: int
    trained: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int | None:
        """All of it, where all of it is known."""
        known = self.base + self.trained + self.optimizer
        return None if self.activations is None else known + self.activations


def plan(
    family: Family,
    config: EtherConfig,
    resolution: int,
    latents: tuple[int, int],
    batch_size: int = 1,
    optimizer: str = "adamw",
    quantization: Quantization | None = None,
    checkpointing: bool = False,
) -> Plan:
    """The memory of one step.

    Args:
        family: around a denoiser on the meta device, in the dtype of the computation; it has no adapter.
        config: of the adapter.
        resolution: side of the pictures in pixels.
        latents: channels of the latents, and pixels per latent and side.
        batch_size: pictures.
        optimizer: adamw, adamw8bit or prodigy.
        quantization: of the base.
        checkpointing: whether activations are computed again.
    """
    denoiser: Any = family.denoiser
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    base = base_bytes(denoiser, quantization)
    adapter = attach(denoiser.requires_grad_(False), config)
    trained = adapter.num_parameters()
    adapter.to("meta")
    switch = denoiser.enable_gradient_checkpointing if checkpointing else denoiser.disable_gradient_checkpointing
    switch()
    denoiser.train()
    own = [*denoiser.parameters(), *denoiser.buffers(), *adapter.parameters()]
    try:
        kept = kept_on_meta(lambda: _forward(family, resolution, latents, batch_size), own)
    except RuntimeError:  # what the meta device says of values that it has not
        kept = None
    adapter.detach()
    states = int(OPTIMIZER_STATES[optimizer] * trained)
    return Plan(parameters, base, 8 * trained, states, kept)


def base_bytes(denoiser: nn.Module, quantization: Quantization | None = None) -> int:
    """Bytes of the weights, those that are quantised in fewer bits."""
    total = 0.0
    for path, module in denoiser.named_modules():
        for parameter in module.parameters(recurse=False):
            size = float(parameter.numel() * parameter.element_size())
            if quantization is not None and parameter.dim() > 1 and is_quantizable(denoiser, path):
                size = parameter.numel() * BITS[quantization] / 8
            total += size
    return int(total)


def kept_on_meta(work: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes of the storages that ``work`` keeps for a backward on the meta device, its ``own`` tensors left out."""
    known = {tensor.untyped_storage()._cdata for tensor in own}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in known:
            kept[storage] = tensor  # alive, so that no other storage gets its number
        return tensor

    with _thrifty_attention(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = work()
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _forward(family: Family, resolution: int, latents: tuple[int, int], batch_size: int) -> Tensor:
    (channels, factor), denoiser = latents, family.denoiser
    side = resolution // factor
    noisy = torch.zeros(batch_size, channels, side, side, device="meta", dtype=denoiser.dtype)
    times = torch.zeros(batch_size, device="meta")
    arguments = family.arguments(
        noisy, times, family.blank_prompts(batch_size), torch.zeros(batch_size, 6, device="meta")
    )
    return family.prediction(denoiser(**arguments), noisy)


class _Attention(torch.autograd.Function):
    """Attention as the kernels of GPUs do it: the output and a number for each row are kept, and no scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _thrifty_attention() -> Iterator[None]:
    def attention(query: Tensor, key: Tensor, value: Tensor, *more: object, **others: object) -> Tensor:
        found: Tensor = _Attention.apply(query, key, value)
        return found

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


def report(family: Family, config: TrainingConfig) -> str:
    """The plan of a run, for its resolution without and with checkpointing, as Markdown.

    Args:
        family: around parts on the meta device.
        config: of the run.
    """
    resolution = config.resolution or family.native_resolution
    latents = (family.latent_channels, family.vae_factor)
    own = config.ether_config() if config.entry.is_own else EtherConfig(targets=config.target_patterns)
    plans = {
        name: plan(
            family,
            own,
            resolution,
            latents,
            config.train_batch_size,
            config.optimizer,
            config.base_quantization,
            checkpointing,
        )
        for name, checkpointing in {"as it is": False, "with --gradient_checkpointing": True}.items()
        if not (checkpointing and family.CHECKPOINTING)
    }
    encoders = sum(p.numel() * p.element_size() for each in family.text_encoders.values() for p in each.parameters())
    kept = f"base in {config.base_quantization}" if config.base_quantization else f"base in {family.denoiser.dtype}"
    lines = [
        f"{family.TITLE}, {resolution} px, batch {config.train_batch_size}, {kept}; GiB, computed and not measured:",
        "",
        table(plans),
        f"Before the first step the text encoders are on the device, {encoders / GIBIBYTE:.2f} GiB in fp32, in half "
        "precision half of it; CUDA itself and the pictures that are drawn take some more.",
    ]
    if config.prompt_chunks == "auto":
        lines.append("A prompt is counted as one chunk: how many prompt_chunks=auto takes, the captions will say.")
    if config.encodes_prompts:
        lines.append(
            "They stay there, since prompts are encoded in every step; what they keep for the backward is not counted."
        )
    if not config.entry.is_own:
        lines.append(f"The adapter of {title_of(config.to_dict())} is counted as if it were one of ETHER+.")
    return "\n".join(lines)


def table(plans: dict[str, Plan]) -> str:
    """Markdown of plans by name, in GiB."""
    heads = ["", "parameters", "base", "adapter and gradients", "optimiser", "activations", "together"]
    rows = [
        [
            name,
            f"{each.parameters / 1e9:.2f} B",
            *(
                "not known" if size is None else f"{size / GIBIBYTE:.2f}"
                for size in (each.base, each.trained, each.optimizer, each.activations, each.total)
            ),
        ]
        for name, each in plans.items()
    ]
    return markdown_table(heads, rows, (0,))
