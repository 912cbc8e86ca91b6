"""The rows of all active reflections of a model, made together at the start of its forward.

A projection needs its vectors normalised and spread over rows, some ten small operations and as many in the
backward. Vectors of one shape are stacked, so that a whole model takes ten operations per shape and not per side.

The rows belong to one forward of the whole model. They are found through a context variable, which is set only while
that forward runs: another thread, a part that is called alone, or a recomputation in a backward does not see them, and
each projection then makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
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


def own_rows(slot: Slot, side: int) -> Rows:
    """The rows of one side of a slot, made for one projection alone: (k, d), or (adapters, k, d)."""
    if isinstance(slot, tuple):
        return _stacked([method.vectors()[side] for method in slot])
    return block_rows(*slot.vectors()[side])


def _stacked(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> Rows:
    """The rows of many (u, v) of one shape, in one go."""
    seconds = [v for _, v in pairs if v is not None]
    return block_rows(torch.stack([u for u, _ in pairs]), torch.stack(seconds) if seconds else None)


class ForwardRows:
    """The rows of one forward of one model.

    Attributes:
        host: whose forward it is.
        rows: by slot.
        with_gradients: whether they were made with gradients.
    """

    def __init__(self, host: object, slots: Sequence[Slot], dtype: torch.dtype) -> None:
        self.host = host
        self.rows = make_rows(slots, dtype)
        self.with_gradients = torch.is_grad_enabled()
        self._versions = {slot: _versions(slot) for slot in slots}

    def of(self, slot: Slot) -> Sides | None:
        """The rows of a slot; None where they may not be used: without the gradients that are wanted, or outdated."""
        if torch.is_grad_enabled() and not self.with_gradients:
            return None
        sides = self.rows.get(slot)
        if sides is None or any(vector._version != version for vector, version in self._versions[slot]):
            return None
        return sides


def _versions(slot: Slot) -> list[tuple[Tensor, int]]:
    """The vectors of a slot with how often each was written to, where torch counts it."""
    methods = slot if isinstance(slot, tuple) else (slot,)
    vectors = [vector for method in methods for pair in method.vectors() for vector in pair if vector is not None]
    return [(vector, vector._version) for vector in vectors if not vector.is_inference()]


_RUNNING: ContextVar[tuple[ForwardRows, ...]] = ContextVar("running forwards", default=())
"""The forwards of whole models that this thread is in, one for each host."""


def open_forward(host: object, slots: Sequence[Slot], dtype: torch.dtype) -> None:
    """A forward of the host's whole model begins; a compiler is left to fuse each projection's own rows."""
    if not torch.compiler.is_compiling():
        others = [
            forward for forward in _RUNNING.get() if forward.host is not host
        ]  # one that was cut off leaves no rows
        _RUNNING.set((*others, ForwardRows(host, slots, dtype)))


def close_forward(host: object) -> None:
    """The forward of the host's model has ended."""
    if torch.compiler.is_compiling():
        return
    _RUNNING.set(tuple([forward for forward in _RUNNING.get() if forward.host is not host]))


def rows_of(host: object, slot: Slot) -> Sides | None:
    """The rows that the running forward of the host's model has for a slot; None where the projection makes its own."""
    if torch.compiler.is_compiling():
        return None
    for forward in _RUNNING.get():
        if forward.host is host:
            return forward.of(slot)
    return None
