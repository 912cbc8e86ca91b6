"""The tables of the benchmark of subjects, of pairs, of controls and of intervals, from their result files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from step_tables import RESULTS, load

from ether_diffusion.evaluation.controls.compact import read_rows
from ether_diffusion.evaluation.controls.findings import MIOU, Findings, differences, mean
from ether_diffusion.evaluation.mixing.findings import comparisons_table as pairs_compared
from ether_diffusion.evaluation.mixing.findings import planned
from ether_diffusion.evaluation.mixing.findings import scores_table as scores_table_of_pairs
from ether_diffusion.evaluation.statistics import (
    Comparison,
    choice_table,
    chosen_by_others,
    compare,
    coverage_table,
    mean_interval,
)
from ether_diffusion.evaluation.subjects.compact import read_compact
from ether_diffusion.evaluation.subjects.settings import ANCHORS, BASE
from ether_diffusion.evaluation.subjects.summary import (
    BY_KEY,
    Result,
    Row,
    best_rates,
    comparisons,
    summarize,
    unit_values,
)
from ether_diffusion.evaluation.tables import comparison_cells, comparisons_table, format_difference, format_score
from ether_diffusion.page.text import markdown_table, number
from ether_diffusion.registry import METHODS

SIZES = {"naive": "n = 4", "lora": "r = 4", "oft": "n = 4", "boft": "n = 4", "hra": "r = 8"}
"""In the studies whose results are in the tables."""
TITLES = {
    **{name: f"{entry.title} {SIZES[name]}" if name in SIZES else entry.title for name, entry in METHODS.items()},
    "full": METHODS["full"].title.lower(),
    **{"delora": "DeLoRA r = 4", "dora": "DoRA r = 4", "rslora": "rsLoRA r = 4", "loha": "LoHa r = 4"},
    **{"lokr": "LoKr r = 4", "ia3": "IA3", "one_sided": "ETHER+ one-sided"},
    **{"truth": "*truth*", "base": "*base*", "copies": "*copies of the references*", "noise": "*noise*"},
}
MINUS = "−"


def benchmark(name: str) -> list[Result]:
    """The jobs of a benchmark's result file."""
    return read_compact(RESULTS / f"{name}.json").results


def with_interval(row: Row, key: str) -> str:
    """A score's mean with its interval."""
    return format_score({**row["scores"][key], "spread": None}) if key in row["scores"] else ""


def subjects() -> str:
    """README: the benchmark of eight subjects."""
    return _subjects(("truth", "dino", "clip_t"))


def subjects_whole() -> str:
    """docs: the same with all scores."""
    return _subjects(("truth", "dino", "dino_nearest", "clip_i", "clip_t", "pres_scaled", "drift_scaled"))


def _subjects(keys: tuple[str, ...]) -> str:
    more = [result for result in benchmark("playground-peft") if result["arm"] not in ANCHORS]
    rows = summarize([*benchmark("playground"), *more])
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


def defaults() -> str:
    """Every method at its default settings, the best first, beside its tuned ones."""
    tuned = {row["arm"]: row for row in summarize(benchmark("playground"))}
    rows = {row["arm"].removesuffix("_default"): row for row in summarize(benchmark("playground-defaults"))}
    methods = sorted(tuned.keys() & METHODS.keys(), key=lambda name: -rows[name]["scores"]["truth"]["mean"])

    def cells(row: Row, rate: float) -> list[str]:
        return [
            number(rate, "g"),
            f"{row['parameters']:,}",
            with_interval(row, "truth"),
            f"{row['scores']['clip_t']['mean']:.3f}",
        ]

    lines = []
    for name in methods:
        entry, row = METHODS[name], tuned[name]
        assert entry.rate is not None  # the benchmark's methods have a default
        lines.append([entry.title, *cells(rows[name], entry.rate.value), *cells(row, row["learning_rate"])])
    heads = ("rate", "parameters", "truth-likeness", "CLIP-T")
    return markdown_table(["method", *(f"{what} {head}" for what in ("default", "tuned") for head in heads)], lines)


def subjects_compared() -> str:
    """The leader of the first plan's eight methods against every other of them."""
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


def rates(*names: str) -> str:
    """The learning rates on the tuning subjects: truth-likeness at each, the chosen one in bold."""
    rows = [row for name in names for row in summarize(benchmark(name)) if row["learning_rate"] is not None]
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


def mixing() -> str:
    """docs: two adapters in one picture."""
    return scores_table_of_pairs(load("mixing")["scores"])


def mixing_compared() -> str:
    """docs: the planned comparisons of that."""
    return pairs_compared(planned(load("mixing")["scores"]["truth"]))


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


def control_rates(name: str) -> str:
    """A study of controls: mIoU of every arm at each rate, by the seed of the training."""
    found = control_study(name)
    seeds = sorted(found.finished[0].seeds)
    lines = []
    for setting in found.finished:
        values = {row["seed"]: row["scores"][MIOU]["mean"] for row in setting.last}
        told = ", ".join(f"{values[seed]:.3f}" for seed in seeds)
        lines.append([setting.arm, setting.label, told, f"{mean(setting.last):.3f}"])
    lines += [[arm, number(rate, "g"), "diverged", ""] for arm, rate in sorted(found.diverged)]
    return markdown_table(["", "rate", f"mIoU, seeds {', '.join(map(str, seeds))}", "mean"], lines)


CONTROL_COMPARED = ("", "difference in mIoU, 95 % interval", "p (Holm)", "seeds", "")
"""The heads of comparisons of a study of controls."""


def control_compared(name: str) -> str:
    """The planned comparisons of a study of controls, paired by the seed of the training."""
    lines = [
        [f"{each.arm} {MINUS} {each.rival}", *comparison_cells(each)]
        for each in control_comparisons(control_study(name))
    ]
    return markdown_table(CONTROL_COMPARED, lines)


def control_rates_compared() -> str:
    """The comparisons of rates and seeds, at the rates best over all seeds; beside them by the first plan's rule."""
    found = control_study("control-rates")
    first = {(each.arm, each.rival): each.difference for each in compare(*by_the_other_seeds(found))}
    lines = []
    for each in control_comparisons(found):
        cells = [f"{each.arm} {MINUS} {each.rival}", *comparison_cells(each)]
        lines.append([*cells, format_difference(first[each.arm, each.rival])])
    return markdown_table([*CONTROL_COMPARED, "rates chosen by the other seeds"], lines)


def by_the_other_seeds(found: Findings) -> tuple[dict[str, dict[str, float]], list[tuple[str, str]]]:
    """Of every arm mIoU by the seed, at the rate that is best over the other seeds; and the planned pairs."""
    values: dict[str, dict[str, float]] = {}
    for arm in found.best:
        by_rate = [
            {str(row["seed"]): row["scores"][MIOU]["mean"] for row in setting.last}
            for setting in found.finished
            if setting.arm == arm
        ]
        seeds = sorted(by_rate[0])
        chosen = chosen_by_others(np.array([[rate[seed] for seed in seeds] for rate in by_rate]))
        values[arm] = {seed: by_rate[number][seed] for seed, number in zip(seeds, chosen, strict=True)}
    return values, [(each.arm, each.rival) for each in control_comparisons(found)]


def control_comparisons(found: Findings) -> list[Comparison]:
    """The planned comparisons of a study of controls."""
    return differences(found, ["encoder alone", "ETHER+"])


def control_study(name: str) -> Findings:
    """A study of controls, from its result file."""
    return read_rows(RESULTS / f"{name}.json")


def coverage() -> str:
    """How often intervals hold the true mean."""
    found = load("coverage")
    return coverage_table(found["rows"], found["rounds"])


def coverage_of_choice() -> str:
    """The same where a method's setting is chosen from the scores that are compared."""
    return choice_table(load("coverage")["chosen"])


TABLES: dict[str, Callable[[], str]] = {
    "subjects": subjects,
    "subjects-whole": subjects_whole,
    "subjects-compared": subjects_compared,
    "defaults": defaults,
    "anchors": anchors,
    "rates": partial(rates, "rates"),
    "rates-peft": partial(rates, "rates-peft"),
    "flow-rates": partial(rates, "flow-rates", "flow-rates-methods"),
    "both-bases": both_bases,
    "mixing": mixing,
    "mixing-compared": mixing_compared,
    "control": control,
    "control-rates": partial(control_rates, "control-rates"),
    "control-rates-compared": control_rates_compared,
    "control-further-rates": partial(control_rates, "control-further-rates"),
    "control-more-seeds": partial(control_rates, "control-more-seeds"),
    "control-more-seeds-compared": partial(control_compared, "control-more-seeds"),
    "coverage": coverage,
    "coverage-choice": coverage_of_choice,
}
