"""Gradient checkpointing computes parts of a forward again: if other adapters act by then, it must be an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn


class SwitchedError(RuntimeError):
    """Adapters were switched between a forward and the backward that computes parts of it again."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"adapters were switched between the forward and the backward of {where}, which computes parts of the "
            "forward again (gradient checkpointing): call backward before you switch, or turn checkpointing off"
        )


def refuse_switches(
    model: nn.Module, switches: Iterable[nn.Module], output: object, generation: Callable[[], object]
) -> None:
    """Let the backward of a forward that checkpoints raise SwitchedError if another plan acts by then.

    Args:
        model: whose forward has ended.
        switches: its modules that may checkpoint.
        output: of the forward.
        generation: what acts on the model, as a value that can be compared.
    """
    again = any(module.gradient_checkpointing for module in switches)
    if not again or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    before = generation()

    def check(_: Tensor) -> None:
        if generation() != before:
            raise SwitchedError(type(model).__name__)

    for tensor in tensors_of(output):
        if tensor.requires_grad:
            tensor.register_hook(check)


def tensors_of(output: object) -> Iterator[Tensor]:
    """The tensors in what a model returns: a tensor, a tuple, or one of the libraries' output classes."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_of(value)
