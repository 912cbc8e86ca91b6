"""The tables of base models: families, what is trained in each, and the memory of a step."""

from __future__ import annotations

import sys
from collections.abc import Callable

from step_tables import load

from ether_diffusion.doctor.capacity import computed
from ether_diffusion.families.protocol import CLIP_LENGTH
from ether_diffusion.families.registry import FAMILIES
from ether_diffusion.page.text import markdown_table


def families() -> str:
    """The families of base models, as their classes say."""
    heads = [
        "family",
        "pipelines",
        "objective",
        "latents",
        "time",
        "steps",
        "guidance",
        "tokens",
        "what is its own",
    ]
    lines = []
    for family in FAMILIES.values():
        own = str(sys.modules[family.__module__].__doc__).partition(": ")[2].strip().removesuffix(".")
        lines.append(
            [
                family.TITLE,
                ", ".join(f"`{name}`" for name in family.PIPELINES),
                family.OBJECTIVE,
                family.LATENTS,
                family.TIME,
                str(family.STEPS),
                f"{family.GUIDANCE:g}",
                str(family.LENGTH or CLIP_LENGTH),
                own,
            ]
        )
    return markdown_table(heads, lines, text_columns=(0, 1, 2, 3, 4, 8))


def targets() -> str:
    """Trained parameters by base and preset."""
    rows = [
        [
            base,
            f"`{preset}`",
            *(f"{counts[key]:,}" for key in ("linears", "ether", "ether_plus_one_sided", "ether_plus")),
        ]
        for base, found in load("targets").items()
        for preset, counts in found["presets"].items()
    ]
    heads = ["base", "preset", "Linears", "ETHER", "ETHER+, one-sided", "ETHER+"]
    return markdown_table(heads, rows, text_columns=(0, 1))


def fused_linears() -> str:
    """Parts and ranks of the fused Linears."""
    rows = []
    for base, found in load("targets").items():
        for preset in ("attention", "attention+mlp"):
            for name, each in found["presets"][preset]["fused"].items():
                side = "input" if "input" in each else "output"
                parts = ", ".join(f"{part} {width:,}" for part, width in each[side].items())
                ranks = [str(each["rank"][key]) for key in ("ether", "ether_plus_one_sided", "ether_plus")]
                rows.append([base, f"`{name}`", f"`{preset}`", side, parts, *ranks])
    heads = ["base", "Linear", "preset", "side", "parts", "ETHER", "ETHER+, one-sided", "ETHER+"]
    return markdown_table(heads, rows, text_columns=(0, 1, 2, 3, 4))


def memory() -> str:
    """Computed memory of a training step by base."""
    rows = []
    for base, found in computed().items():
        sizes = [found["base"]["bf16"], found["base"]["nf4"], found["trained"], *found["activations"].values()]
        least = found["base"]["nf4"] + found["trained"] + found["activations"]["1024 checkpointed"]
        cells = [f"{size / 2**30:.2f}" for size in (*sizes, least)]
        rows.append([base, f"{found['parameters'] / 1e9:.2f} B", *cells])
    heads = [
        "base",
        "parameters",
        "bf16",
        "nf4",
        "trained",
        "512 px",
        "512 px, checkpointed",
        "1024 px",
        "1024 px, checkpointed",
        "least at 1024 px",
    ]
    return markdown_table(heads, rows, text_columns=(0,))


TABLES: dict[str, Callable[[], str]] = {
    "families": families,
    "targets": targets,
    "fused-linears": fused_linears,
    "memory": memory,
}
