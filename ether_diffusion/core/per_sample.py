"""Which adapter each sample of a batch has, and the rows that a batch of samples gets by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.functional import Rows

COPIES = 3
"""How often a batch may repeat its samples: guidance doubles it, some guidance (PAG, edits) makes three of it."""


def check_mixable(configs: Mapping[str, EtherConfig]) -> None:
    """Raise ValueError unless the adapters can share a batch: settings alike but for the seed, and no Naive."""
    for name, config in configs.items():
        if config.method == "naive":
            raise ValueError(
                f"{name!r} is a Naive adapter, whose blocks are matrices: per_sample mixes reflections only"
            )
    first, *others = configs or [""]
    for other in others:
        if replace(configs[other], seed=configs[first].seed) != configs[first]:
            raise ValueError(
                f"the adapters of a batch must have the same settings: {first!r} has {configs[first]}, "
                f"{other!r} has {configs[other]}"
            )


class PerSample:
    """The adapters of a batch: sample i of a forward has entry i modulo the number of entries.

    So the halves of a batch under classifier-free guidance, [unconditional …, conditional …], meet the same adapters.

    Args:
        names: one per sample; None is the base.

    Raises:
        ValueError: no name is given.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        if not names:
            raise ValueError("per_sample is empty: name an adapter for each sample of the batch, None for the base")
        self.names = tuple(names)
        self.adapters = tuple(dict.fromkeys(name for name in names if name is not None))
        self._entries = [self.adapters.index(name) if name is not None else -1 for name in names]
        self._choices: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor | None, Tensor | None]] = {}

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
        analysis, synthesis = rows
        key = (samples, x.device, synthesis.dtype)
        if key not in self._choices:
            self._choices[key] = self._choice(*key)
        index, acts = self._choices[key]
        if index is not None:
            analysis, synthesis = analysis.index_select(0, index), synthesis.index_select(0, index)
        return Rows(analysis, synthesis if acts is None else synthesis * acts)

    def _choice(self, samples: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Index of each sample's adapter, None if that is its own number; and 0 for the base, None if there is none."""
        entries = self._entries * (samples // len(self._entries))
        acts = None
        if min(entries) < 0:
            acts = torch.tensor([float(entry >= 0) for entry in entries], device=device, dtype=dtype)[:, None, None]
        if entries == list(range(len(self.adapters))):
            return None, acts
        return torch.tensor([max(entry, 0) for entry in entries], device=device), acts
