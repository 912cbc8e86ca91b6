"""The rows of all active reflections of a model, made together at the start of its forward.

A projection needs its vectors normalised and spread over rows, some ten small operations and as many in the
backward. Vectors of one shape are stacked, so that a whole model takes ten operations per shape and not per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.core.functional import Rows, block_rows
from ether_diffusion.core.methods import Reflection, Sides

Slot = Reflection | tuple[Reflection, ...]
"""What one projection needs rows of: a method, or one method for each adapter of a mixed batch."""


def make_rows(slots: Sequence[Slot], dtype: torch.dtype = torch.float32) -> dict[Slot, Sides]:
    """The rows of every slot: (k, d), or (adapters, k, d) where the slot is a tuple of methods.

    Args:
        slots: what to make rows of.
        dtype: of what they are for; the rows are in it if it is a half precision.
    """
    groups: dict[tuple[Any, ...], list[tuple[Slot, int]]] = {}
    for slot in slots:
        first = slot[0] if isinstance(slot, tuple) else slot
        for side, (u, v) in enumerate(first.vectors()):
            count = len(slot) if isinstance(slot, tuple) else 0
            groups.setdefault((count, u.shape, u.dtype, u.device, v is None), []).append((slot, side))
    found: dict[Slot, dict[int, Rows]] = {slot: {} for slot in slots}
    for (count, *_), members in groups.items():
        pairs = [m.vectors()[side] for slot, side in members for m in (slot if isinstance(slot, tuple) else (slot,))]
        rows = _stacked(pairs).for_matmul(dtype)
        parts = [each.unflatten(0, (-1, count)).unbind() if count else each.unbind() for each in rows]
        for (slot, side), analysis, synthesis in zip(members, *parts, strict=True):
            found[slot][side] = Rows(analysis, synthesis)
    return {slot: tuple(sides[side] for side in sorted(sides)) for slot, sides in found.items()}


def stacked_sides(methods: tuple[Reflection, ...]) -> Sides:
    """The rows (adapters, k, d) of one projection's methods, made for it alone."""
    return tuple(_stacked(pairs) for pairs in zip(*(method.vectors() for method in methods), strict=True))


def _stacked(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> Rows:
    """The rows of many (u, v) of one shape, in one go."""
    seconds = [v for _, v in pairs if v is not None]
    return block_rows(torch.stack([u for u, _ in pairs]), torch.stack(seconds) if seconds else None)


class SharedRows:
    """Rows that hold for one forward of the model, and for what gradient checkpointing runs again of it.

    They are made anew for every forward, since an optimiser may write into a parameter unseen. Whoever calls a part of
    the model outside a forward of the whole gets none, and makes his own.
    """

    def __init__(self) -> None:
        self._rows: dict[Slot, Sides] = {}
        self._open = False
        self._graph = False

    def open(self, slots: Sequence[Slot], dtype: torch.dtype) -> None:
        """Make the rows for the forward that begins; a compiler is left to fuse each projection's own."""
        if not torch.compiler.is_compiling():
            self._rows, self._open, self._graph = make_rows(slots, dtype), True, torch.is_grad_enabled()

    def close(self) -> None:
        """The forward has ended; a backward may still run parts of it again."""
        if not torch.compiler.is_compiling():
            self._open = False
            if not self._graph:
                self._rows = {}

    def of(self, slot: Slot) -> Sides | None:
        """The rows of a slot; None outside a forward of the whole model."""
        if torch.compiler.is_compiling() or not (self._open or _in_backward()):
            return None
        if torch.is_grad_enabled() and not self._graph:
            return None
        return self._rows.get(slot)

    def __reduce__(self) -> tuple[type[SharedRows], tuple[()]]:
        return SharedRows, ()  # a copy of the model makes its own


def _in_backward() -> bool:
    """Whether autograd is running: torch's own checkpointing asks in this way."""
    return bool(torch._C._current_graph_task_id() != -1)
