"""What is on the device when: text encoders while prompts are encoded, the autoencoder while pictures are.

A language model as text encoder may be as large as the denoiser; with prompts and latents at hand neither is needed in
a training step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def present(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Within the context the modules are on the device; afterwards they are where they were."""
    away = [(module, home) for module in modules if (home := home_of(module)) not in (None, device)]
    for module, _ in away:
        module.to(device)
    try:
        yield
    finally:
        for module, home in away:
            module.to(home)
        if away and device.type == "cuda":
            torch.cuda.empty_cache()


def home_of(module: nn.Module) -> torch.device | None:
    """Where a module is, by its first tensor; None where it has none."""
    first = next(iter(module.parameters()), next(iter(module.buffers()), None))
    return None if first is None else first.device
