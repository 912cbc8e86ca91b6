"""Whether diffusers' group offloading holds a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def grouped(model: nn.Module) -> bool:
    """Whether parts of the model are under group offloading: a change of their weights would be lost."""
    return any(True for _ in _groups(model))


def on_disk(model: nn.Module) -> bool:
    """Whether group offloading keeps weights in files, so that those in memory may be placeholders."""
    return any(getattr(group, "offload_to_disk_path", None) is not None for group in _groups(model))


def _groups(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            if (group := getattr(hook, "group", None)) is not None:
                yield group
