"""The registry of methods: all that training, runs and evaluation know of a method stands in its entry here.

A method of another library is added by one entry. One of this library also needs its transform in
:mod:`ether_diffusion.core.methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor


class Sizes(Protocol):
    """The settings that a method of peft is built from."""

    @property
    def n_blocks(self) -> int:
        """Diagonal blocks of each projection."""

    @property
    def rank(self) -> int:
        """Rank, or number of reflections."""

    @property
    def peft_config(self) -> Mapping[str, Any] | None:
        """Of ``method=peft``: its type in peft and what that is made from."""


@dataclass(frozen=True)
class Rate:
    """A default learning rate.

    Attributes:
        value: the rate.
        source: who tried it. paper: arXiv 2405.20271, App. C; diffusers: its example scripts; guessed: nobody with
            a public model, it is the rate of a related method.
    """

    value: float
    source: Literal["paper", "diffusers", "guessed"] = "paper"


@dataclass(frozen=True)
class MethodEntry:
    """What differs between methods.

    Attributes:
        name: its value of ``method`` in settings and files.
        title: as people write it.
        saved_as: what holds the result. ether: ``ether_weights.safetensors``; lora: diffusers'
            ``pytorch_lora_weights.safetensors``; peft: a folder of peft for each component; pipeline: the whole
            pipeline; nothing: it trains nothing of the base.
        rate: where it learns a subject and no rate is given; None where one must be given, or it cannot.
        control_rate: where it learns a control; None where one must be given.
        settings: the names of those that are its own.
        per_sample: whether the samples of a batch may have adapters of their own.
        build: its configuration in peft, from the settings and the names of the layers; None where it is not of peft.
        transform: of a layer of peft and the adapter's name: the matrix that the weight is multiplied with, to take
            its distance from the identity. None where it adds; an adapter of this library says it itself.
        variant_of: of a variant that is not the paper's, the method that it changes.
    """

    name: str
    title: str
    saved_as: Literal["ether", "lora", "peft", "pipeline", "nothing"]
    rate: Rate | None
    control_rate: Rate | None
    settings: tuple[str, ...] = ()
    per_sample: bool = False
    build: Callable[[Sizes, list[str]], PeftConfig] | None = None
    transform: Callable[[Any, str], Tensor] | None = None
    variant_of: str | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is an adapter of this library."""
        return self.saved_as == "ether"

    @property
    def is_reflection(self) -> bool:
        """Whether it is made of reflections: what it adds has a low rank, and is a LoRA, exactly."""
        return self.is_own and self.per_sample

    @property
    def has_strength(self) -> bool:
        """Whether its result can act at strengths other than 1."""
        return self.saved_as in ("ether", "lora")

    @property
    def is_any_of_peft(self) -> bool:
        """Whether it stands for many methods, of which a configuration of peft names one."""
        return "peft_config" in self.settings

    @property
    def needs_peft(self) -> bool:
        """Whether its adapter comes from peft."""
        return self.build is not None


def _lora(sizes: Sizes, names: list[str]) -> PeftConfig:
    import peft

    return peft.LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules=names)


def _oft(sizes: Sizes, names: list[str]) -> PeftConfig:
    """The exact Cayley transform of the OFT paper, with n blocks per layer."""
    import peft

    return peft.OFTConfig(r=sizes.n_blocks, oft_block_size=0, use_cayley_neumann=False, target_modules=names)


def _boft(sizes: Sizes, names: list[str]) -> PeftConfig:
    import peft

    return peft.BOFTConfig(boft_block_size=0, boft_block_num=sizes.n_blocks, target_modules=names)


def _hra(sizes: Sizes, names: list[str]) -> PeftConfig:
    import peft

    return peft.HRAConfig(r=sizes.rank, target_modules=names)


def _named(sizes: Sizes, names: list[str]) -> PeftConfig:
    """Any other configuration of peft, by its type.

    Raises:
        ValueError: peft does not know the type or an argument, it is no adapter of layers, or it needs calls between
            the steps that no training here makes.
    """
    import peft

    given = dict(sizes.peft_config or {})
    kind = str(given.pop("peft_type", ""))
    kinds = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    if kind not in kinds:
        raise ValueError(f"peft_config: peft has no peft_type {kind!r}; it has {', '.join(sorted(kinds))}")
    if hasattr(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(kind), "update_and_allocate"):
        raise ValueError(
            f"peft_config: {kind} changes its ranks by a call after every step, which no training here makes: its "
            "ranks would stay those that it starts with; take LORA"
        )
    try:
        return kinds[kind](**given, target_modules=names)
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft_config of {kind}: {error}") from None


def title_of(settings: Mapping[str, Any]) -> str:
    """The method of a training's settings as people write it."""
    entry, config = METHODS[str(settings["method"])], settings.get("peft_config")
    return f"{config['peft_type']} (PEFT)" if config else entry.title


_BLOCKS, _RANK = ("n_blocks", "targets"), ("rank", "targets")
_VECTORS = (*_BLOCKS, "initial_length")
_ENTRIES = (
    MethodEntry("ether", "ETHER", "ether", Rate(6e-3), Rate(1e-3), _VECTORS, per_sample=True),
    MethodEntry("ether_plus", "ETHER+", "ether", Rate(6e-3), Rate(1e-3), (*_VECTORS, "two_sided"), per_sample=True),
    MethodEntry("naive", "Naive", "ether", Rate(6e-5), Rate(1e-5), _BLOCKS),
    MethodEntry("full", "Full finetuning", "pipeline", Rate(5e-6), Rate(1e-5, "diffusers")),
    MethodEntry("lora", "LoRA", "lora", Rate(6e-4), Rate(1e-4, "diffusers"), _RANK, build=_lora),
    MethodEntry(
        "oft",
        "OFT",
        "peft",
        Rate(6e-5),
        Rate(1e-5),
        _BLOCKS,
        build=_oft,
        transform=lambda layer, adapter: layer.oft_R[adapter].get_weight(),
    ),
    MethodEntry(
        "boft",
        "BOFT",
        "peft",
        Rate(6e-5, "guessed"),
        Rate(1e-5, "guessed"),
        _BLOCKS,
        build=_boft,
        transform=lambda layer, adapter: layer.get_delta_weight(adapter)[0],
    ),
    MethodEntry(
        "hra",
        "HRA",
        "peft",
        Rate(6e-5, "guessed"),
        Rate(1e-5, "guessed"),
        _RANK,
        build=_hra,
        transform=lambda layer, adapter: layer.get_delta_weight(adapter),
    ),
    MethodEntry("peft", "An adapter of PEFT", "peft", None, None, ("peft_config", "targets"), build=_named),
    MethodEntry("none", "A control encoder", "nothing", None, Rate(1e-4)),
    MethodEntry(
        "anchored",
        "Anchored ETHER (not the paper's)",
        "ether",
        Rate(6e-3, "guessed"),
        Rate(1e-3, "guessed"),
        _VECTORS,
        per_sample=True,
        variant_of="ether",
    ),
    MethodEntry(
        "ether_plus_free",
        "ETHER+ of free lengths (not the paper's)",
        "ether",
        Rate(6e-3, "guessed"),
        Rate(1e-3, "guessed"),
        (*_VECTORS, "two_sided"),
        per_sample=True,
        variant_of="ether_plus",
    ),
)
METHODS = {entry.name: entry for entry in _ENTRIES}
"""All methods by their names."""
OWN_METHODS = tuple(entry.name for entry in _ENTRIES if entry.is_own)
"""Names of the adapters of this library, which an adapter file may hold."""
