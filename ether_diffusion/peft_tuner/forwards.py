"""What the ETHER layers of one model share: the rows of a running forward, and the adapters of a mixed batch."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.core.host import Link, forward_dtype, links_to
from ether_diffusion.core.linear import Projection, fill_missing
from ether_diffusion.core.rows import Slots, close_forward, open_forward
from ether_diffusion.core.switches import refuse_switches
from ether_diffusion.core.targets import wrapper_at

_ATTRIBUTE = "_ether_forwards"
_LOOKING = threading.Lock()
"""Held while a model is searched for its layers, or its mixed batches are counted: threads may share it."""


class Forwards:
    """Hooks on a model with ETHER layers, which make the rows of all of them at the start of its forward.

    Which adapters act is the layers' own state, kept by PEFT's verbs; here is only what follows from it.

    Attributes:
        model: whose layers they are.
        mixed: how many mixed batches run, in any thread. Code that is being compiled looks at this first, which it can
            guard, unlike a context variable.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._found = Found([], Slots([]), [], [], [])
        self._stale = True
        self._told = False
        self.mixed = 0
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    @staticmethod
    def of(model: nn.Module) -> Forwards:
        """Those of a model, made at the first call."""
        found: Forwards | None = model.__dict__.get(_ATTRIBUTE)
        if found is None:
            found = model.__dict__[_ATTRIBUTE] = Forwards(model)
        return found

    def remove(self) -> None:
        """Take the hooks off a model that has no ETHER layer any more."""
        for handle in self._handles:
            handle.remove()
        self.model.__dict__.pop(_ATTRIBUTE, None)

    def changed(self) -> None:
        """A layer has another plan, or is new."""
        self._stale = True

    def check_part(self, projection: Projection) -> None:
        """Raise RuntimeError if another tuner has merged an update into the weight of a layer that is called alone."""
        module = wrapper_at(self.model, projection.path)
        while module is not None and _projection_of(module) is not projection:
            if getattr(module, "merged_adapters", None):
                raise _merged_around(module)
            module = module._modules.get("base_layer")

    def fill_buffers(self) -> None:
        """Have the buffers of all layers there that compiled code may read."""
        fill_missing(self._follow().projections)

    def _follow(self) -> Found:
        """The layers and what follows from them, looked for anew where one has changed, come or gone."""
        if not self._stale and all(children.get(name) is child for children, name, child in self._found.links):
            return self._found
        with _LOOKING:
            self._stale = False  # before looking: what changes meanwhile is looked for again
            self._found = find(self.model)
        return self._found

    def _begin(self, model: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        found = self._follow()
        if not found.projections:
            self.remove()
            return
        self._warn_of_half(found.projections[0])
        for module in found.around:
            if module.merged_adapters:
                raise _merged_around(module)
        for projection in found.projections:
            bring_back(projection)
            projection.refresh_buffers()
        open_forward(self, found.slots, forward_dtype(found.projections))

    def _warn_of_half(self, first: Projection) -> None:
        """Say once that vectors have been cast, as trainers do that assign to ``data``; who casts one casts all."""
        if self._told:
            return
        kinds = {vector.dtype for method in first.methods.values() for vector in method.parameters()}
        if half := kinds & {torch.float16, torch.bfloat16}:
            self._told = True
            warnings.warn(
                f"the vectors of ETHER have been cast to {half.pop()}, where small steps of training are lost: before "
                "the optimiser is made, cast them back by parameter.data = parameter.data.float() for each of them",
                stacklevel=2,
            )

    def _end(self, model: nn.Module, args: object, output: object) -> None:
        close_forward(self)
        found = self._found
        refuse_switches(
            model, found.switches, output, lambda: [projection.plan.generation for projection in found.projections]
        )


class Found(NamedTuple):
    """The ETHER layers of a model, and what follows from them; made whole, for threads may share it.

    Attributes:
        projections: of the layers.
        slots: what their plans need rows of.
        links: all that has to stay as it is for these to be the layers.
        around: layers of other tuners around them.
        switches: modules that may checkpoint.
    """

    projections: list[Projection]
    slots: Slots
    links: list[Link]
    around: list[BaseTunerLayer]
    switches: list[nn.Module]


def find(model: nn.Module) -> Found:
    """Look through a model."""
    modules = list(model.modules())
    projections = [found for module in modules if (found := _projection_of(module)) is not None]
    inside = {id(module) for projection in projections for module in projection.module.modules()}
    around = [
        module
        for module in modules
        if isinstance(module, BaseTunerLayer)
        and _projection_of(module) is None
        and id(module) not in inside
        and any(_projection_of(each) is not None for each in module.modules())
    ]
    return Found(
        projections,
        Slots(list(dict.fromkeys(slot for projection in projections for slot in projection.slot))),
        links_to(model, [projection.path for projection in projections]),
        around,
        [module for module in modules if hasattr(module, "gradient_checkpointing")],
    )


def bring_back(projection: Projection) -> None:
    """Keep vectors out of Accelerate's offloading: they are few, and it brings back only modules that are called."""
    for method in projection.methods.values():
        if getattr(method.__dict__.get("_hf_hook"), "offload", False):
            remove_hook_from_module(method)


def _projection_of(module: nn.Module | None) -> Projection | None:
    found = module.__dict__.get("projection") if module is not None else None
    return found if isinstance(found, Projection) else None


def _merged_around(module: Any) -> RuntimeError:
    return RuntimeError(
        f"{type(module).__module__}.{type(module).__name__} stands around an ETHER layer and has merged "
        f"{', '.join(module.merged_adapters)} into the weight beneath, which ETHER would transform, too: unmerge it, "
        "or merge both"
    )


class Named(NamedTuple):
    """The adapters of the samples of a running forward.

    Attributes:
        forwards: whose forward it is.
        names: one per sample.
        beams: by how many each sample is repeated in the decoder.
    """

    forwards: object
    names: tuple[str, ...]
    beams: int

    def of_batch(self, size: int) -> tuple[str, ...]:
        """The names for a batch: as they are, or each repeated for its beams, which an encoder never sees."""
        if self.beams > 1 and size == self.beams * len(self.names):
            return tuple([name for name in self.names for _ in range(self.beams)])
        return self.names


_NAMED: ContextVar[tuple[Named, ...]] = ContextVar("mixed batches", default=())
"""The mixed batches that this thread is in."""


@contextmanager
def mixed_batch(forwards: Forwards, names: Sequence[str], beams: int) -> Iterator[None]:
    """Within this, samples of a forward of the model have adapters of their own."""
    token = _NAMED.set((*_NAMED.get(), Named(forwards, tuple(names), beams)))
    with _LOOKING:
        forwards.mixed += 1
    try:
        yield
    finally:
        _NAMED.reset(token)
        with _LOOKING:
            forwards.mixed -= 1


def names_of(forwards: Forwards, size: int) -> tuple[str, ...] | None:
    """The names for a batch in the running forward of a model; None where all samples have the active adapters."""
    if not forwards.mixed:
        return None
    for named in reversed(_NAMED.get()):
        if named.forwards is forwards:
            return named.of_batch(size)
    return None
