"""What an adapter is: the method, its blocks and the projections that it acts on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ether_diffusion.registry import METHODS, OWN_METHODS

LoraFormat = Literal["diffusers", "kohya", "comfyui", "original"]
"""Whose names an exported LoRA has; a family offers some of them."""
FloatDtype = Literal["float16", "bfloat16", "float32"]
"""Of numbers that are stored, or computed with."""


@dataclass(frozen=True)
class EtherConfig:
    """Settings of one adapter, as they are stored in the adapter file.

    Attributes:
        method: "ether" (one reflection per input side), "ether_plus" (its relaxation), "naive" (unconstrained blocks,
            the paper's baseline); two variants that are not the paper's: "anchored" (ETHER's reflection and a frozen
            one, which together start as the identity) and "ether_plus_free" (ETHER+ without the unit length).
        n_blocks: number of diagonal blocks; must divide the features of every target, of a fused Linear those of every
            part. The number of parameters of all but Naive does not depend on it. The paper does not state its value
            for images.
        two_sided: ETHER+, of free lengths as well: transform the output features as well as the input features (the
            paper's default).
        targets: a preset ("attention", "attention+mlp", "all", "self", "cross", "attention+geglu",
            "attention+geglu_input") or name patterns such as ("attn2.to_k", "mid_block.*"); see
            :func:`ether_diffusion.core.targets.find_targets`.
        seed: seed of the vectors' initial directions.

    Raises:
        ValueError: a field has a value that no adapter can have.
    """

    method: str = "ether_plus"
    n_blocks: int = 4
    two_sided: bool = True
    targets: str | tuple[str, ...] = "attention"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in OWN_METHODS:
            near, known = suggestion(self.method, OWN_METHODS), ", ".join(OWN_METHODS)
            raise ValueError(f"unknown method {self.method!r}{near}; there are: {known}")
        if not isinstance(self.n_blocks, int) or self.n_blocks < 1:
            raise ValueError(f"n_blocks must be a whole number of at least 1, not {self.n_blocks!r}")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise ValueError('targets is empty: name a preset such as "attention", or patterns of module names')

    @property
    def is_relaxed(self) -> bool:
        """Whether it has v beside u, and can be two-sided."""
        return "two_sided" in METHODS[self.method].settings

    @property
    def acts_on_outputs(self) -> bool:
        """Whether the output features are transformed as well."""
        return self.is_relaxed and self.two_sided

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EtherConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a key that this version does not know, so that no setting is dropped in silence.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown settings {unknown} in an adapter's config; this version knows {known}")
        return cls(**values)


def suggestion(given: str, options: Iterable[str]) -> str:
    """', did you mean "…"?' with the option nearest to ``given``, or nothing when none is near."""
    nearest = difflib.get_close_matches(given, list(options), n=1, cutoff=0.5)
    return f', did you mean "{nearest[0]}"?' if nearest else ""
