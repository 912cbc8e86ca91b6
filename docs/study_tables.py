"""The tables of planned studies in the docs, from the committed rows of every picture and the studies' configs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from step_tables import RESULTS

from ether_diffusion.evaluation.paper.learning_rates import widths_by_subject, widths_table
from ether_diffusion.evaluation.paper.rate_losses import (
    RateLoss,
    compare_losses,
    loss_comparisons_table,
    losses_table,
    rate_losses,
)
from ether_diffusion.evaluation.statistics import Comparison, paired_difference
from ether_diffusion.evaluation.subjects.against import beside, read_rows
from ether_diffusion.evaluation.subjects.choosing import on_other_prompts
from ether_diffusion.evaluation.subjects.compact import read_compact
from ether_diffusion.evaluation.subjects.planned import planned_comparisons
from ether_diffusion.evaluation.subjects.summary import (
    BY_KEY,
    Result,
    at_strength,
    strengths_in,
    summarize,
    unit_values,
)
from ether_diffusion.evaluation.tables import comparison_cells, format_difference, format_score
from ether_diffusion.page.text import markdown_table, number

CONFIGS = Path(__file__).parents[1] / "configs"
STUDIES = {
    "initial-length": "eval_initial_length",
    "learning-rates": "eval_playground_factors",
    "chosen-step": "eval_chosen_step",
    "unit-length": "eval_unit_length",
    "energy": "eval_energy",
    "blocks": "eval_blocks_rates",
    "layers": "eval_layers",
    "playground-flow": "eval_playground_flow",
    "playground-peft": "eval_playground_peft",
    "playground-defaults": "eval_playground_defaults",
    "playground-strengths": "eval_playground_strengths",
    "anchored": "eval_anchored",
    "anchored-rates": "eval_anchored_rates",
}
"""From the result file of a study to its config."""
TRUTH = BY_KEY["truth"]
TEN = 10
"""The multiple of the rate that the study of learning rates compares."""
DISTANCES = {"transforms": "‖T − I‖", "weights": "‖W′ − W‖"}
"""From the distances that a result has to how they are written."""


def settings_of(study: str) -> dict[str, Any]:
    """What the study's config says."""
    found: dict[str, Any] = yaml.safe_load((CONFIGS / f"{STUDIES[study]}.yaml").read_text(encoding="utf-8"))
    return found


def results_of(study: str) -> list[Result]:
    """The rows of all its pictures, or of those that its plan compares, with the ones that it runs against."""
    found = read_compact(RESULTS / f"{study}.json").results
    if against := settings_of(study).get("against"):
        return beside(found, read_rows(CONFIGS.parent / against))
    return on_other_prompts(found) if study == "chosen-step" else found


def cells(study: str, distances: bool = False) -> str:
    """Truth-likeness and CLIP-T of every arm at every rate; if asked for, how far its transforms went."""
    rows = [
        [
            row["arm"],
            number(row["learning_rate"], ".3g"),
            format_score(row["scores"].get("truth")),
            format_score(row["scores"].get("clip_t")),
            *([number(row.get("distances", {}).get(each), ".3g") for each in DISTANCES] if distances else []),
        ]
        for row in summarize(results_of(study))
        if row["learning_rate"] is not None or row["arm"] == "base"
    ]
    heads = ["", "learning rate", "truth-likeness", "CLIP-T", *(DISTANCES.values() if distances else [])]
    return markdown_table(heads, rows)


def fully_scored() -> str:
    """Every arm of the comparison of anchored, with what leaked into the class and drift."""
    keys = ("truth", "clip_t", "pres_scaled", "drift_scaled")
    rows = [
        [
            row["arm"],
            number(row["learning_rate"], ".3g"),
            f"{row['parameters']:,}" if row.get("parameters") else "",
            *(format_score(row["scores"].get(key)) for key in keys),
        ]
        for row in summarize(results_of("anchored"))
        if row["learning_rate"] is not None or row["arm"] == "base"
    ]
    return markdown_table(["", "learning rate", "parameters", *(BY_KEY[key].heading for key in keys)], rows)


def planned(study: str) -> str:
    """The planned comparisons, and below them those that have no test."""
    settings, results = settings_of(study), results_of(study)

    def rows(found: list[Comparison], tested: bool) -> list[list[str]]:
        blank = ["not tested", "", ""]
        return [
            [each.arm, *(comparison_cells(each) if tested else [comparison_cells(each)[0], *blank])] for each in found
        ]

    tested = planned_comparisons(results, settings["planned"], TRUTH)
    shown = planned_comparisons(results, settings.get("secondary", {}), TRUTH)
    heads = ["", "difference of truth-likeness, 95 % interval", "p (Holm)", "subjects", ""]
    return markdown_table(heads, rows(tested, True) + rows(shown, False))


def strengths(study: str) -> str:
    """Every method at lower strengths: the scores, and their differences from strength 1, paired by subject."""
    results = results_of(study)
    lines = []
    for arm in settings_of(study)["arms"]:
        mine = [result for result in results if result["arm"] == arm]
        for strength in strengths_in(mine):
            cells = [arm, number(strength, "g")]
            for metric in (TRUTH, BY_KEY["clip_t"]):
                there, at_one = unit_values(at_strength(mine, strength), metric), unit_values(mine, metric)
                cells += [f"{fmean(there.values()):.3f}", format_difference(paired_difference(there, at_one))]
            lines.append(cells)
    minus = "minus strength 1, 95 % interval"
    return markdown_table(["", "strength", "truth-likeness", minus, "CLIP-T", minus], lines)


def chosen_steps() -> str:
    """By subject the truth-likeness of the last and the chosen step, on other prompts, and which step it was."""
    settings, results = settings_of("chosen-step"), results_of("chosen-step")
    rows = []
    for subject in settings["subjects"]:
        cells = []
        for arm in settings["arms"]:
            both = {r["arm"]: r for r in results if r["subject"] == subject and r["arm"] in (arm, f"{arm}, best")}
            values = {name: unit_values([result], TRUTH)[subject] for name, result in both.items()}
            cells += [str(both[arm]["chosen_step"]), f"{values[arm]:.3f}", f"{values[f'{arm}, best']:.3f}"]
        rows.append([subject, *cells])
    heads = [f"{arm}: {what}" for arm in settings["arms"] for what in ("chosen step", "last", "chosen")]
    return markdown_table(["", *heads], rows)


def compared_losses() -> tuple[list[RateLoss], list[Comparison]]:
    """What multiples of the found learning rate cost, and whether ten times it costs others more than ETHER+."""
    found = rate_losses(results_of("learning-rates"), settings_of("learning-rates")["tuned_rates"], TRUTH)
    return found, compare_losses(found, TEN, "ether_plus")


def losses() -> str:
    """The tables of what multiples of the found learning rate cost."""
    found, compared = compared_losses()
    tuned = settings_of("learning-rates")["tuned_rates"]
    return losses_table(found, tuned, TRUTH) + "\n" + loss_comparisons_table(compared, TEN, TRUTH)


def widths() -> str:
    """The decades in which each method keeps most of its best gain."""
    results = results_of("learning-rates")
    return widths_table(
        {arm: widths_by_subject(results, arm, TRUTH) for arm in settings_of("learning-rates")["tuned_rates"]}, TRUTH
    )


TABLES: dict[str, Callable[[], str]] = {
    "initial-length": partial(cells, "initial-length"),
    "initial-length-planned": partial(planned, "initial-length"),
    "unit-length": partial(cells, "unit-length", distances=True),
    "unit-length-planned": partial(planned, "unit-length"),
    "blocks": partial(cells, "blocks", distances=True),
    "blocks-planned": partial(planned, "blocks"),
    "layers": partial(cells, "layers"),
    "layers-planned": partial(planned, "layers"),
    "flow": partial(cells, "playground-flow"),
    "flow-planned": partial(planned, "playground-flow"),
    "flow-strengths": partial(strengths, "playground-flow"),
    "strengths": partial(strengths, "playground-strengths"),
    "peft-planned": partial(planned, "playground-peft"),
    "defaults-planned": partial(planned, "playground-defaults"),
    "energy": partial(cells, "energy", distances=True),
    "energy-planned": partial(planned, "energy"),
    "anchored": fully_scored,
    "anchored-rates": partial(cells, "anchored-rates"),
    "anchored-planned": partial(planned, "anchored"),
    "chosen-step": chosen_steps,
    "chosen-step-planned": partial(planned, "chosen-step"),
    "rate-losses": losses,
    "rate-widths": widths,
}
