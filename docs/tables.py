"""Every table of figures in README and docs is made from a result file in ``docs/results``, that of families from code,
that of memory from the figures that ``ether doctor`` has.

``python docs/tables.py`` writes the tables between ``<!-- table: NAME -->`` and ``<!-- end -->``; ``--count`` first
counts the parameters of the methods on Stable Diffusion 1.5 and on the language models. A test holds the pages against
the files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "examples")]

import benchmark_tables
import family_tables
import step_tables
import study_tables
from benchmark_tables import TITLES
from captions_table import Results, compared_table, methods_table, rates_table
from step_tables import RESULTS, load

from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table

BLOCK = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)
PAGES = [
    page for page in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))) if BLOCK.search(page.read_text("utf-8"))
]
"""Those with such a table."""
SETTINGS = ("steps", "rate", "strength", "photos", "blocks", "text-encoder")
"""Those of docs/settings.md, in its order."""


def method_parameters() -> str:
    """README: the methods, with the trained parameters on Stable Diffusion 1.5."""
    counts = load("parameters")
    plus = "y = H⁺ₒ W H⁺ x + b, H⁺ = I − ûûᵀ + v̂v̂ᵀ"
    rows = [
        ["`ether`", "y = W H x + b, H = I − 2ûûᵀ", "ether", "exactly 2", "a random reflection"],
        ["`ether_plus` (default)", plus, "ether_plus", "at most √2 a side", "the identity"],
        ["`ether_plus`, one-sided", "y = W H⁺ x + b", "ether_plus_one_sided", "at most √2", "the identity"],
        ["`naive` (the paper's control)", "y = W N x + b, N any block-diagonal", "naive", "unbounded", "the identity"],
    ]
    heads = ["method", "forward", "parameters on SD1.5", "‖T − I‖ per block", "start"]
    lines = [[name, what, f"{counts[key]:,}", bound, start] for name, what, key, bound, start in rows]
    return markdown_table(heads, lines, text_columns=(0, 1, 3, 4))


def language_parameters() -> str:
    """Trained numbers of the examples of language, without a head."""
    paper = {"glue": {"ether": "0.09M", "ether_plus": "0.33M"}}
    titles = {"glue": "GLUE, DeBERTaV3-base", "instruction": "instructions, Llama-2-7B"}
    methods = {**TITLES, "lora": "LoRA r = 8"}
    rows = [
        [titles[example], methods[method], f"{size:,}", paper.get(example, {}).get(method, "")]
        for example, sizes in load("language-parameters").items()
        for method, size in sizes.items()
    ]
    return markdown_table(["example", "method", "trained numbers", "the paper says"], rows, text_columns=(0, 1))


def study_of_language(table: Callable[[Results], str]) -> str:
    """A table of the study of language, or that it has not been run."""
    return table(load("language")) if (RESULTS / "language.json").is_file() else "The study has not been run yet.\n"


def setting(name: str) -> str:
    """docs: the scores under too little and too much of a setting."""
    found = load("settings")
    keys = {"truth": "truth-likeness", "dino": "DINO", "dino_nearest": "nearest photo", "clip_t": "CLIP-T"}
    rows = [
        [title, *(f"{scores[key]:.2f}" for key in keys)]
        for title, scores in {"base": found["base"], **found[name]}.items()
    ]
    return markdown_table(["", *keys.values()], rows)


TABLES: dict[str, Callable[[], str]] = {
    **step_tables.TABLES,
    **study_tables.TABLES,
    **benchmark_tables.TABLES,
    **family_tables.TABLES,
    "method-parameters": method_parameters,
    "language-parameters": language_parameters,
    "language": lambda: study_of_language(methods_table),
    "language-compared": lambda: study_of_language(compared_table),
    "language-rates": lambda: study_of_language(rates_table),
    **{f"setting-{name}": partial(setting, name) for name in SETTINGS},
}


def filled(page: str) -> str:
    """The text of a page with its tables made anew.

    Raises:
        KeyError: it names a table that does not exist.
    """
    return BLOCK.sub(lambda found: f"<!-- table: {found['name']} -->\n{TABLES[found['name']]()}<!-- end -->", page)


def count_parameters() -> dict[str, int]:
    """Trained parameters of the methods on the attention of Stable Diffusion 1.5's UNet, n = 4."""
    import torch
    from diffusers import UNet2DConditionModel

    import ether_diffusion as ether
    from ether_diffusion.playground.sd15 import UNET

    kinds: dict[str, dict[str, Any]] = {
        "ether": {"method": "ether"},
        "ether_plus": {"method": "ether_plus"},
        "ether_plus_one_sided": {"method": "ether_plus", "two_sided": False},
        "naive": {"method": "naive"},
    }
    found = {}
    for name, settings in kinds.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**UNET)
        found[name] = ether.attach(unet, ether.EtherConfig(n_blocks=4, **settings)).num_parameters()
    return found


def count_language() -> dict[str, dict[str, int]]:
    """Trained numbers of the examples of language on the architectures of the paper, without a head."""
    from glue import GlueConfig
    from glue import count as count_glue
    from instruction import InstructionConfig
    from instruction import count as count_instruction
    from language_settings import Method

    methods: tuple[Method, ...] = ("ether", "ether_plus", "lora")
    return {
        "glue": {method: count_glue(GlueConfig(method=method))[0] for method in methods},
        "instruction": {method: count_instruction(InstructionConfig(method=method)) for method in methods},
    }


def main() -> None:
    """Write the tables of all pages anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", action="store_true", help="count the methods' parameters before, also those on language models"
    )
    if parser.parse_args().count:
        write_text(RESULTS / "parameters.json", json.dumps(count_parameters(), indent=1) + "\n")
        write_text(RESULTS / "language-parameters.json", json.dumps(count_language(), indent=1) + "\n")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            write_text(page, new)
            print(f"written anew: {page.name}")


if __name__ == "__main__":
    main()
