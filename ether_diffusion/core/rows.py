"""The rows of all active reflections of a model, made together at the start of its forward.

A projection needs its vectors normalised and spread over rows, some ten small operations and as many in the
backward. Vectors of sides with one layout are stacked, so that a whole model takes ten operations per layout and not
per side.

The rows belong to one forward of the whole model. They are found through a context variable, which is set only while
that forward runs: another thread, a part that is called alone, or a recomputation in a backward does not see them, and
each projection then makes its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from ether_diffusion.core.functional import Formula, Rows, block_rows
from ether_diffusion.core.methods import Pair, Reflection, Sides, Vectors, rows_of_side

Slot = Reflection | tuple[Reflection, ...]
"""What one projection needs rows of: a method, or one method for each adapter of a mixed batch."""
Place = tuple[Slot, int]
"""A side of a slot."""


def own_rows(slot: Slot) -> Sides:
    """The rows of a slot, made for one projection alone: (k, d), or (adapters, k, d)."""
    if not isinstance(slot, tuple):
        return slot.sides()
    sides = zip(slot[0].layouts, *(method.vectors() for method in slot), strict=True)
    return tuple(
        [
            rows_of_side(layout, [_stacked(slot[0].formula, each) for each in zip(*of_methods, strict=True)])
            for layout, *of_methods in sides
        ]
    )


def _stacked(formula: Formula, pairs: Sequence[Pair]) -> Rows:
    """The rows of many (u, v) of one shape, in one go."""
    seconds = [v for _, v in pairs if v is not None]
    return block_rows(formula, torch.stack([u for u, _ in pairs]), torch.stack(seconds) if seconds else None)


class Slots:
    """All slots of a model, sorted by the layouts of their sides, so that the rows of one layout are made at once.

    Sorting takes as long as the arithmetic of a small model: it is done when the plan changes, not at every forward.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._methods = {slot: slot if isinstance(slot, tuple) else (slot,) for slot in slots}
        self._groups: dict[object, list[Place]] = {}
        for slot, (first, *others) in self._methods.items():
            for side, (layout, pairs) in enumerate(zip(first.layouts, first.vectors(), strict=True)):
                key = (len(others), isinstance(slot, tuple), layout, len(pairs[0][0]), first.formula)
                self._groups.setdefault(key, []).append((slot, side))

    def vectors(self) -> dict[Slot, list[Vectors]]:
        """The vectors of every slot, of each method."""
        return {slot: [method.vectors() for method in methods] for slot, methods in self._methods.items()}

    def rows(self, vectors: Mapping[Slot, list[Vectors]], dtype: torch.dtype) -> dict[Slot, Sides]:
        """The rows of every slot: (k, d), or (adapters, k, d) where the slot is a tuple of methods.

        Args:
            vectors: of :meth:`vectors`.
            dtype: of what they are for; the rows are in it if it is a half precision.
        """
        found: dict[Slot, dict[int, Rows]] = {slot: {} for slot in self._methods}
        for group in self._groups.values():
            for members in _alike(group, vectors):
                slot, side = members[0]
                sides = [of_method[side] for slot, side in members for of_method in vectors[slot]]
                first = self._methods[slot][0]
                stacked = [_stacked(first.formula, pairs) for pairs in zip(*sides, strict=True)]
                rows = rows_of_side(first.layouts[side], stacked).for_matmul(dtype)
                if isinstance(slot, tuple):
                    rows = Rows(*(each.unflatten(0, (-1, len(slot))) for each in rows))
                for (slot, side), *both in zip(members, rows.analysis.unbind(), rows.synthesis.unbind(), strict=True):
                    found[slot][side] = Rows(*both)
        return {slot: tuple([rows[side] for side in range(len(rows))]) for slot, rows in found.items()}


def _alike(members: list[Place], vectors: Mapping[Slot, list[Vectors]]) -> Iterable[list[Place]]:
    """The members by the device and dtype of their vectors; nearly always they are on one."""
    kinds: dict[object, list[Place]] = {}
    for slot, side in members:
        u, _ = vectors[slot][0][side][0]
        kinds.setdefault((u.device, u.dtype), []).append((slot, side))
    return kinds.values()


class ForwardRows:
    """The rows of one forward of one model.

    Attributes:
        host: whose forward it is.
        rows: by slot.
        with_gradients: whether they were made with gradients.
    """

    def __init__(self, host: object, slots: Slots, dtype: torch.dtype) -> None:
        self.host = host
        self.with_gradients = torch.is_grad_enabled()
        vectors = slots.vectors()
        self.rows = slots.rows(vectors, dtype)
        self._versions = {slot: _versions(pairs) for slot, pairs in vectors.items()}

    def of(self, slot: Slot) -> Sides | None:
        """The rows of a slot; None where they may not be used: without the gradients that are wanted, or outdated."""
        if torch.is_grad_enabled() and not self.with_gradients:
            return None
        vectors, versions = self._versions.get(slot, ([], [0]))
        return self.rows[slot] if [vector._version for vector in vectors] == versions else None


def _versions(methods: list[Vectors]) -> tuple[list[Tensor], list[int]]:
    """Vectors, with how often each was written to, where torch counts it."""
    vectors = [each for sides in methods for pairs in sides for pair in pairs for each in pair if each is not None]
    if vectors and vectors[0].is_inference():
        return [], []
    return vectors, [vector._version for vector in vectors]


_RUNNING: ContextVar[tuple[ForwardRows, ...]] = ContextVar("running forwards", default=())
"""The forwards of whole models that this thread is in, one for each host."""


def open_forward(host: object, slots: Slots, dtype: torch.dtype) -> None:
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


def in_forward(host: object) -> bool:
    """Whether this thread is in a forward of the host's whole model."""
    return any(forward.host is host for forward in _RUNNING.get())
