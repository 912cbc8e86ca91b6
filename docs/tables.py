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
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "examples")]

import step_tables
import study_tables
from captions_table import Results, compared_table, methods_table, rates_table
from step_tables import RESULTS, load

from ether_diffusion.doctor.capacity import computed
from ether_diffusion.evaluation.mixing.findings import comparisons_table as pairs_compared
from ether_diffusion.evaluation.mixing.findings import planned
from ether_diffusion.evaluation.mixing.findings import scores_table as scores_table_of_pairs
from ether_diffusion.evaluation.statistics import compare, coverage_table, mean_interval
from ether_diffusion.evaluation.subjects.arms import ANCHORS, BASE
from ether_diffusion.evaluation.subjects.compact import read_compact
from ether_diffusion.evaluation.subjects.summary import (
    BY_KEY,
    Result,
    Row,
    best_rates,
    comparisons,
    summarize,
    unit_values,
)
from ether_diffusion.evaluation.tables import comparisons_table, format_difference, format_score
from ether_diffusion.families.protocol import CLIP_LENGTH
from ether_diffusion.families.registry import FAMILIES
from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table, number
from ether_diffusion.registry import METHODS

BLOCK = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)
PAGES = [
    page for page in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))) if BLOCK.search(page.read_text("utf-8"))
]
"""Those with such a table."""
SETTINGS = ("steps", "rate", "strength", "photos", "blocks", "text-encoder")
"""Those of docs/settings.md, in its order."""
SIZES = {"naive": "n = 4", "lora": "r = 4", "oft": "n = 4", "boft": "n = 4", "hra": "r = 8"}
"""In the studies whose results are in the tables."""
TITLES = {
    **{name: f"{entry.title} {SIZES[name]}" if name in SIZES else entry.title for name, entry in METHODS.items()},
    "full": METHODS["full"].title.lower(),
    **{"truth": "*truth*", "base": "*base*", "copies": "*copies of the references*", "noise": "*noise*"},
}
MINUS = "−"


def benchmark(name: str) -> list[Result]:
    """The jobs of a benchmark's result file."""
    return read_compact(RESULTS / f"{name}.json").results


def with_interval(row: Row, key: str) -> str:
    """A score's mean with its interval."""
    return format_score({**row["scores"][key], "spread": None}) if key in row["scores"] else ""


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


def mixing() -> str:
    """docs: two adapters in one picture."""
    return scores_table_of_pairs(load("mixing")["scores"])


def mixing_compared() -> str:
    """docs: the planned comparisons of that."""
    return pairs_compared(planned(load("mixing")["scores"]["truth"]))


def subjects() -> str:
    """README: the benchmark of eight subjects."""
    return _subjects(("truth", "dino", "clip_t"))


def subjects_whole() -> str:
    """docs: the same with all scores."""
    return _subjects(("truth", "dino", "dino_nearest", "clip_i", "clip_t", "pres_scaled", "drift_scaled"))


def _subjects(keys: tuple[str, ...]) -> str:
    rows = summarize(benchmark("playground"))
    methods = [row for row in rows if row["arm"] in TITLES and row["arm"] not in ANCHORS]
    methods.sort(key=lambda row: -row["scores"]["truth"]["mean"])
    by_arm = {row["arm"]: row for row in rows}
    order = [by_arm["truth"], *methods, by_arm["base"], by_arm["copies"], by_arm["noise"]]
    lines = [
        [
            TITLES[row["arm"]],
            number(row["learning_rate"], "g"),
            f"{row['parameters']:,}" if row["parameters"] else "",
            with_interval(row, keys[0]),
            *("" if key not in row["scores"] else f"{row['scores'][key]['mean']:.3f}" for key in keys[1:]),
        ]
        for row in order
    ]
    heads = ["method", "learning rate", "parameters", *(BY_KEY[key].heading for key in keys)]
    return markdown_table(heads, lines)


def subjects_compared() -> str:
    """The leader of the benchmark against every other method."""
    found = comparisons(benchmark("playground"))
    titled = [replace(each, arm=TITLES[each.arm], rival=TITLES[each.rival]) for each in found]
    return comparisons_table(titled, BY_KEY["truth"])


def anchors() -> str:
    """Truth-likeness of the truth, copies, the base and noise on every subject."""
    results = benchmark("playground")
    values = {arm: unit_values([r for r in results if r["arm"] == arm], BY_KEY["truth"]) for arm in ANCHORS}
    arms = ("truth", "copies", BASE, "noise")
    rows = [[name, *(f"{values[arm][name]:.3f}" for arm in arms)] for name in values[BASE]]
    rows.append(["**mean**", *(f"{mean_interval(values[arm].values()).mean:.3f}" for arm in arms)])
    return markdown_table(["subject", *(TITLES[arm].strip("*") for arm in arms)], rows)


def rates() -> str:
    """The learning rates on the tuning subjects: truth-likeness at each, the chosen one in bold."""
    rows = [row for row in summarize(benchmark("rates")) if row["learning_rate"] is not None]
    best = {row["arm"]: row["learning_rate"] for row in best_rates(rows)}
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["learning_rate"])
        cells = []
        for row in of_arm:
            cell = f"{row['learning_rate']:g}: {row['scores']['truth']['mean']:.3f}"
            cells.append(f"**{cell}**" if row["learning_rate"] == best[arm] else cell)
        lines.append([TITLES[arm], ", ".join(cells)])
    return markdown_table(["method", "learning rate: truth-likeness"], lines, text_columns=(0, 1))


def both_bases() -> str:
    """ETHER+ at three rates on the tuning subjects, on both embedded bases: truth-likeness, and DINO in brackets."""
    lines = []
    for name, title in (("rates", "UNet"), ("flow-rates", "flow transformer")):
        results = [each for each in benchmark(name) if each["arm"] in (BASE, "ether_plus")]
        tried = sorted({each["learning_rate"] for each in benchmark("flow-rates") if each["arm"] == "ether_plus"})
        for rate in (None, *tried):
            arm = BASE if rate is None else "ether_plus"
            chosen = [
                each for each in results if each["arm"] == arm and (rate is None or each["learning_rate"] == rate)
            ]
            truth, dino = (unit_values(chosen, BY_KEY[key]) for key in ("truth", "dino"))
            cells = [f"{truth[subject]:.3f} ({dino[subject]:.3f})" for subject in truth]
            mean = f"{mean_interval(truth.values()).mean:.3f} ({mean_interval(dino.values()).mean:.3f})"
            lines.append([title, "*base*" if rate is None else f"ETHER+ {rate:g}", *cells, mean])
            title = ""
    return markdown_table(["", "", *truth, "mean"], lines, text_columns=(0, 1))


def control() -> str:
    """The study of controls over three seeds of the training."""
    found: Mapping[str, Any] = load("control")
    arms = {
        arm: {str(seed): value for seed, value in zip(found["seeds"], entry["miou"], strict=True)}
        for arm, entry in found["arms"].items()
    }
    alone = found["alone"]
    compared = {each.arm: each for each in compare(arms, [(arm, alone) for arm in arms if arm != alone])}
    lines = []
    for arm, entry in found["arms"].items():
        each = compared.get(arm)
        lines.append(
            [
                arm,
                f"{entry['parameters']:,}",
                ", ".join(f"{value:.3f}" for value in entry["miou"]),
                f"{mean_interval(entry['miou']).mean:.3f}",
                "" if each is None else format_difference(each.difference),
                number(None if each is None else each.p_holm, ".2f"),
            ]
        )
    seeds = ", ".join(map(str, found["seeds"]))
    heads = ["method", "adapter", f"mIoU, seeds {seeds}", "mean", f"{MINUS} {alone}, 95 % interval", "p (Holm)"]
    return markdown_table(heads, lines)


def coverage() -> str:
    """How often intervals hold the true mean."""
    found = load("coverage")
    return coverage_table(found["rows"], found["rounds"])


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
    "method-parameters": method_parameters,
    "mixing": mixing,
    "mixing-compared": mixing_compared,
    "subjects": subjects,
    "subjects-whole": subjects_whole,
    "subjects-compared": subjects_compared,
    "anchors": anchors,
    "both-bases": both_bases,
    "rates": rates,
    "control": control,
    "coverage": coverage,
    "families": families,
    "targets": targets,
    "memory": memory,
    "fused-linears": fused_linears,
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
