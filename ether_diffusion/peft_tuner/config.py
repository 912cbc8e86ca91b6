"""The settings of an ETHER adapter in PEFT's form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ether_diffusion.config import EtherConfig, suggestion
from ether_diffusion.core.layout import INPUT_PARTS, OUTPUT_PARTS
from ether_diffusion.files import write_text
from ether_diffusion.peft_tuner.registration import peft_type
from ether_diffusion.registry import METHODS

VARIANTS = tuple(entry.name for entry in METHODS.values() if entry.is_reflection)
CARD = """
## Before loading

This adapter is of the type `ETHER`, which PEFT does not know by itself. Import the tuner first:

```python
import ether_diffusion.peft_tuner  # pip install ether-diffusion peft; registers the type
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```
"""


@dataclass
class EtherPeftConfig(PeftConfig):
    """Settings of an ETHER adapter (arXiv 2405.20271) for ``get_peft_model`` and all that builds on it.

    Attributes:
        variant: "ether", y = weight (H x) + bias, or "ether_plus", y = H⁺_out (weight (H⁺ x)) + bias; "anchored",
            y = weight (H₀ H x) + bias with a frozen H₀, and "ether_plus_free", ETHER+ without the unit length, are not
            the paper's.
        n_blocks: number of diagonal blocks; must divide the features of every target, and leave two per block.
        two_sided: ETHER+, of free lengths as well: transform the output features as well.
        target_modules: names of Linears as PEFT takes them: a list of names or ends of paths, a regular expression,
            or "all-linear"; None means the usual ones of the architecture.
        exclude_modules: likewise, what is left out.
        exclude_parts: of fused Linears of diffusion transformers, the parts that stay as they are: "attention", "q",
            "k", "v", "mlp".
        layers_to_transform: indices of the layers that are meant, with a list of ``target_modules``.
        layers_pattern: name of the list of layers.
        modules_to_save: modules that are trained and saved whole beside the adapter.
        init_weights: True is the paper's start; False draws u and v of ETHER+, and u and u₀ of the anchored variant,
            apart, so that they start as no identity.
        seed: of the initial directions; None takes them from torch's global generator, as PEFT's tuners do.
        origin: what a file of ``ether.save`` says beside the vectors; see :func:`ether_diffusion.peft_tuner.to_peft`.

    Raises:
        ValueError: a value that no adapter can have.
    """

    variant: str = field(default="ether_plus", metadata={"help": f"One of {', '.join(VARIANTS)}."})
    n_blocks: int = field(default=4, metadata={"help": "Number of diagonal blocks."})
    two_sided: bool = field(default=True, metadata={"help": "ETHER+: transform the output features as well."})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Names of Linears."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "What is left out."})
    exclude_parts: list[str] | None = field(default=None, metadata={"help": "Parts of fused Linears to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained whole."})
    init_weights: bool = field(default=True, metadata={"help": "False draws v apart from u."})
    seed: int | None = field(default=None, metadata={"help": "Seed of the initial directions."})
    origin: dict[str, Any] | None = field(default=None, metadata={"help": "What the adapter file said."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        if self.variant not in VARIANTS:
            near = suggestion(str(self.variant), VARIANTS)
            raise ValueError(f"unknown variant {self.variant!r}{near}; there are: {', '.join(VARIANTS)}")
        if not isinstance(self.init_weights, bool):
            raise ValueError(
                f"init_weights={self.init_weights!r} means nothing to ETHER: True is the paper's start, False draws "
                "u and v apart"
            )
        for name in self.exclude_parts or ():
            if name not in INPUT_PARTS + OUTPUT_PARTS:
                parts = ", ".join(dict.fromkeys(INPUT_PARTS + OUTPUT_PARTS))
                raise ValueError(f"exclude_parts has {name!r}; the parts of fused Linears are {parts}")
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        self.ether_config()

    def ether_config(self, targets: str | tuple[str, ...] = ("*",)) -> EtherConfig:
        """The same settings in this library's form.

        Raises:
            ValueError: ``n_blocks`` is no whole number of at least 1.
        """
        return EtherConfig(self.variant, self.n_blocks, self.two_sided, targets, self.seed or 0)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the settings, and write into the model card beside them what has to be imported before loading."""
        super().save_pretrained(save_directory, **kwargs)
        write_import(Path(save_directory))


def _as_set(names: list[str] | set[str] | str | None) -> set[str] | str | None:
    return set(names) if isinstance(names, list | tuple) else names


def write_import(folder: Path) -> None:
    """Put the import that an ETHER folder needs into its model card, once.

    PEFT's card lies a folder above where an adapter has a folder of its name; not where that is another adapter's.
    """
    own, above = folder / "README.md", folder.parent / "README.md"
    alone = own.is_file() or (folder.parent / "adapter_config.json").is_file() or not _is_peft(above)
    cards = [own] if alone else [own, above]
    for card in cards:
        text = card.read_text(encoding="utf-8") if card.is_file() else "---\nlibrary_name: peft\n---\n"
        if "ether_diffusion.peft_tuner" not in text:
            write_text(card, f"{text.rstrip()}\n{CARD}")


def _is_peft(card: Path) -> bool:
    return card.is_file() and "library_name: peft" in card.read_text(encoding="utf-8")
