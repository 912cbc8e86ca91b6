"""What acts on one projection: decided once, when something changes, and immutable from then on.

The host makes a plan for every projection whenever adapters are attached, set, turned on or off, fused or removed. A
projection holds its plan and nothing else that changes; whatever a call needs lives in that call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ether_diffusion.core.adapter import Adapter
from ether_diffusion.core.functional import Rows
from ether_diffusion.core.methods import Method, Reflection

COPIES = 3
"""How often a batch may repeat its samples: guidance doubles it, some guidance (PAG, edits) makes three of it."""


def check_mixable(adapters: Mapping[str, Adapter]) -> None:
    """Raise ValueError unless the adapters can share a batch: settings and projections alike, and no Naive."""
    for name, adapter in adapters.items():
        if adapter.config.method == "naive":
            raise ValueError(
                f"{name!r} is a Naive adapter, whose blocks are matrices: per_sample mixes reflections only"
            )
    first, *others = adapters or [""]
    for other in others:
        configs = [adapters[name].config for name in (first, other)]
        if replace(configs[1], seed=configs[0].seed) != configs[0]:
            raise ValueError(
                f"the adapters of a batch must have the same settings: {first!r} has {configs[0]}, "
                f"{other!r} has {configs[1]}"
            )
        shapes = [{key: each.shape for key, each in adapters[name].named_parameters()} for name in (first, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the adapters of a batch must act on the same projections, and {first!r} and {other!r} do not: one of "
                "them was trained with version 0.1, whose presets name others in this model"
            )


@dataclass(frozen=True)
class SampleNames:
    """The adapters of a batch: sample i of a forward has entry i modulo the number of entries.

    So the halves of a batch under classifier-free guidance, [unconditional …, conditional …], meet the same adapters.

    Attributes:
        names: one per sample; None is the base.
        adapters: the distinct names, in the order of their first samples.

    Raises:
        ValueError: no name is given.
    """

    names: tuple[str | None, ...]
    adapters: tuple[str, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("per_sample is empty: name an adapter for each sample of the batch, None for the base")
        distinct = tuple(dict.fromkeys(name for name in self.names if name is not None))
        object.__setattr__(self, "adapters", distinct)

    def choose(self, rows: Rows, x: Tensor, path: str) -> Rows:
        """Of the rows (adapters, k, d) those of each sample of x: (samples, k, d).

        Raises:
            ValueError: the number of samples is not one, two or three times that of the names.
        """
        samples, given = x.shape[0], len(self.names)
        if samples % given or not 1 <= samples // given <= COPIES:
            raise ValueError(
                f"per_sample names {given} adapters, but {path} got a batch of {samples}: it must be {given}, or "
                f"{2 * given} or {3 * given} under guidance; with several images per prompt pass images_per_prompt"
            )
        entries = [-1 if name is None else self.adapters.index(name) for name in self.names] * (samples // given)
        analysis, synthesis = rows
        if entries != list(range(len(self.adapters))):
            index = torch.tensor([max(entry, 0) for entry in entries], device=x.device)
            analysis, synthesis = analysis.index_select(0, index), synthesis.index_select(0, index)
        if min(entries) < 0:
            acts = torch.tensor([float(entry >= 0) for entry in entries], device=x.device, dtype=synthesis.dtype)
            synthesis = synthesis * acts[:, None, None]
        return Rows(analysis, synthesis)


@dataclass(frozen=True, eq=False)
class Off:
    """Nothing acts: the projection is the base's.

    Attributes:
        generation: the same for equal plans of a host, another for others: see :class:`Generations`.
    """

    generation: int = 0


@dataclass(frozen=True, eq=False)
class Mixture:
    """W + Σ s ΔW.

    Attributes:
        parts: methods with their strengths, none of them 0.
        generation: see :class:`Off`.
        reflections: the parts that are reflections.
        two_sided: whether a part has an output side.
        as_sides: whether it is a product (I + E_out) W (I + E_in) with E of low rank. That holds for one reflection at
            strength 1 and for input-sided reflections at any strengths.
    """

    parts: tuple[tuple[Method, float], ...]
    generation: int
    reflections: tuple[Reflection, ...] = field(init=False)
    two_sided: bool = field(init=False)
    as_sides: bool = field(init=False)

    def __post_init__(self) -> None:
        reflections = tuple(method for method, _ in self.parts if isinstance(method, Reflection))
        two_sided = any(method.two_sided for method, _ in self.parts)
        alone = len(self.parts) == 1 and self.parts[0][1] == 1.0
        object.__setattr__(self, "reflections", reflections)
        object.__setattr__(self, "two_sided", two_sided)
        object.__setattr__(self, "as_sides", len(reflections) == len(self.parts) and (alone or not two_sided))


@dataclass(frozen=True, eq=False)
class PerSample:
    """Each sample of a batch has an adapter of its own, at strength 1.

    Attributes:
        methods: of the adapters that the samples have, in the order of ``samples.adapters``.
        samples: which sample has which.
        generation: see :class:`Off`.
    """

    methods: tuple[Reflection, ...]
    samples: SampleNames
    generation: int

    @property
    def two_sided(self) -> bool:
        """Whether the methods, which are of one kind, have an output side."""
        return self.methods[0].two_sided


Plan = Off | Mixture | PerSample


class Generations:
    """Numbers for what acts on a model: the same number whenever the same adapters act in the same way.

    A recomputation in a backward that finds another number than its forward had would give wrong gradients; turning
    adapters off and on again in between is no change.
    """

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def of(self, content: object) -> int:
        """The number of what acts, which must be hashable."""
        return self._numbers.setdefault(content, len(self._numbers))
