"""The tables of benchmarks and studies of controls as Markdown, with captions that say what intervals are of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.evaluation.controls.findings import MEASURES, MIOU, Findings, Setting, mean, spread
from ether_diffusion.evaluation.runner import Job
from ether_diffusion.evaluation.statistics import Comparison, Estimate
from ether_diffusion.evaluation.subjects.compact import settings_in, write_compact
from ether_diffusion.evaluation.subjects.settings import ANCHORS
from ether_diffusion.evaluation.subjects.summary import (
    BY_KEY,
    METRICS,
    REAL,
    Metric,
    Result,
    Row,
    comparisons,
    facts_of,
    primary,
    read_results,
    strength_rows,
    summarize,
)
from ether_diffusion.files import write_text
from ether_diffusion.metrics.control_tasks import Measure
from ether_diffusion.page.text import interval, markdown_table, number

DIGITS = {"fid": 2}
"""Of scores that have not three."""
ONE_SEED = "One seed of the training: there is no interval, since another seed may give another order."


def shown_metrics(rows: Iterable[Row]) -> list[Metric]:
    """The scores that some row has, without those that another one stands for."""
    known = {key for row in rows for key in row["scores"]}
    return [metric for metric in METRICS if metric.key in known and metric.instead not in known]


def scores_table(rows: list[Row]) -> str:
    """The rows of :func:`~ether_diffusion.evaluation.subjects.summary.summarize`: mean ± spread [interval]."""
    metrics = shown_metrics(rows)
    lines = []
    for row in rows:
        rate = number(row["learning_rate"], "g")
        parameters = f"{row['parameters']:,}" if row["parameters"] else ""
        note = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        cells = [format_score(row["scores"].get(metric.key)) for metric in metrics]
        lines.append([f"{row['arm']}{note}", rate, parameters, *cells])
    heads = ["method", "learning rate", "parameters", *(metric.heading for metric in metrics)]
    return markdown_table(heads, lines)


def comparisons_table(found: Sequence[Comparison], metric: Metric) -> str:
    """The leader's lead over each other method; nothing where there are no two methods."""
    if not found:
        return ""
    heads = [f"{metric.title} of {found[0].arm} minus that of", "difference, 95 % interval", "p (Holm)", "subjects", ""]
    rows = [[each.rival, *comparison_cells(each)] for each in found]
    return markdown_table(heads, rows)


def comparison_cells(found: Comparison) -> list[str]:
    """The difference with its interval, the corrected p, how many units it is of, and whether it is separated."""
    verdict = "" if found.p_holm is None else "separated" if found.separated else "not separated"
    return [format_difference(found.difference), number(found.p_holm, ".2g"), str(found.difference.units), verdict]


def strengths_table(results: list[Result]) -> str:
    """The methods at other strengths than 1, and which are on the front of the score that decides and CLIP-T."""
    found = strength_rows(results)
    if not found:
        return ""
    metrics = [primary(summarize(results)), BY_KEY["clip_t"], BY_KEY["dino_nearest"]]
    lines = [
        [
            each.row["arm"],
            number(each.row["learning_rate"], "g"),
            f"{each.strength:g}",
            *(format_score(each.row["scores"].get(metric.key)) for metric in metrics),
            "•" if each.on_front else "",
        ]
        for each in found
    ]
    return markdown_table(["method", "learning rate", "strength", *(m.heading for m in metrics), "front"], lines)


def format_score(found: Mapping[str, float | None] | None) -> str:
    """A score with its spread and interval: ``0.412 ± 0.010 [0.380, 0.441]``; nothing where there is none."""
    return "" if found is None else interval(found["mean"], found["low"], found["high"], spread=found["spread"])


def format_difference(found: Estimate) -> str:
    """A difference with its sign and interval: ``+0.051 [+0.012, +0.090]``."""
    return interval(found.mean, found.low, found.high, "+.3f")


def caption(rows: Sequence[Row], compared: Sequence[Comparison]) -> list[str]:
    """What the tables' figures are of, sentence by sentence: units, intervals, seeds, anchors, comparisons."""
    methods = [row for row in rows if row["arm"] not in (*ANCHORS, REAL)]
    seeds = sorted({seed for row in methods for seed in row["seeds"]})
    subjects = max((row["subjects"] for row in rows), default=0)
    told = [f"Means over {subjects} subjects, of each the mean over its seeds and pictures."]
    if subjects > 1:
        told.append("[ ]: 95 % interval, Student's t over subjects.")
    else:
        told = ["One subject, so there is no interval: another subject may give another order."]
    if len(seeds) > 1:
        told.append(f"±: standard deviation over {len(seeds)} seeds of the training.")
    elif methods:
        told.append("One seed of the training: what another seed changes is not in the intervals.")
    if anchors := [f"{name}: {ANCHORS[name]}" for name in ANCHORS if any(row["arm"] == name for row in rows)]:
        told.append("; ".join(anchors).capitalize() + ".")
    if any(metric.key.endswith("_scaled") for metric in shown_metrics(rows)):
        told.append("Scaled: 0 is the base, 1 copies of the references whatever is asked.")
    if not {"truth", "div"} & {key for row in rows for key in row["scores"]}:
        told.append("DIV, which falls where pictures are copies, is not measured: it needs --lpips.")
    if compared:
        told.append(
            f"{compared[0].arm} has the highest score of these results, so its lead is biased upwards; "
            f"p is corrected for {len(compared)} comparisons."
        )
    return told


def judges_line(judges: Mapping[str, Mapping[str, str]]) -> str:
    """The judges with the hashes of their weights, in one sentence; nothing where they are not known."""
    named = [f"{name} {each['model']} ({each['weights']})" for name, each in judges.items() if "weights" in each]
    return f"Judges: {', '.join(named)}." if named else ""


def write_summary(folder: Path, jobs: Sequence[Job[Any]]) -> tuple[str, list[str]]:
    """Write the files of :func:`write_tables` of the jobs that are done.

    Other processes may finish jobs and write the same files meanwhile; whoever writes last has read all of them.

    Returns:
        The text of ``summary.md``, and the keys of the jobs that are not done, which it and ``summary.json`` name.
    """
    while True:
        results, missing = read_results(folder, jobs)
        text = write_tables(folder, results, missing)
        if read_results(folder, jobs)[1] == missing:
            return text, missing


def write_tables(folder: Path, results: list[Result], missing: list[str]) -> str:
    """Write ``scores.jsonl`` (a line per image), ``results.json`` (one per job), ``summary.json`` and ``summary.md``.

    Returns:
        The text of ``summary.md``.
    """
    common = ("arm", "learning_rate", "subject", "seed", "judges", "references")
    lines = [
        json.dumps({name: result.get(name) for name in common} | {"kind": kind} | row)
        for result in results
        for kind in dict.fromkeys(metric.rows for metric in METRICS)
        for row in result.get(kind, [])
    ]
    facts = facts_of(results, missing)
    text = summary_text(results, missing, facts["judges"])
    write_text(folder / "scores.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(folder / "summary.json", json.dumps(facts, indent=1))
    write_text(folder / "summary.md", text)
    write_compact(folder / "results.json", results, settings_in(folder))
    return text


def summary_text(results: list[Result], missing: Sequence[str], judges: Mapping[str, Any]) -> str:
    """Scores, comparisons, captions and judges as one text."""
    rows, compared = summarize(results), comparisons(results)
    parts = [scores_table(rows), comparisons_table(compared, primary(rows)), strengths_table(results)]
    parts.append("\n".join([*caption(rows, compared), judges_line(judges)]).strip() + "\n" if rows else "")
    if missing:
        parts.append(f"Not in these tables ({len(missing)}): {', '.join(missing)}\n")
    return "\n".join(part for part in parts if part)


def known_measures(settings: Iterable[Setting]) -> list[Measure]:
    """What all the settings were scored by."""
    scores = [row["scores"] for setting in settings for row in setting.last]
    return [measure for key, measure in MEASURES.items() if all(key in found for found in scores)]


def controls_table(best: dict[str, Setting]) -> str:
    """One row per arm at its best rate: parameters of the adapter and of the encoder, and the scores."""
    if not best:
        return "nothing can be compared yet\n"
    keys = {measure.key: measure.title for measure in known_measures(best.values())}
    first = next(iter(best.values()))
    heads = ["method", "rate", "adapter", "control", *keys.values()]
    rows = []
    for arm, setting in best.items():
        facts = [setting.label, *(f"{count:,}" for count in setting.counts)]
        rows.append([arm, *facts, *(cell(setting, key) for key in keys)])
    if originals := first.last[0]["originals"]:
        rows.append(["*originals*", "", "", "", *(figure(originals.get(key), key) for key in keys)])
    return markdown_table(heads, rows) + f"\n{spread_caption(len(first.seeds))}\n"


def spread_caption(seeds: int) -> str:
    """What the means and ± of a table of so many seeds are over."""
    if seeds > 1:
        return f"Means over {seeds} seeds of the training; ± is their standard deviation."
    return f"{ONE_SEED} ± is the standard deviation over the sample numbers."


def control_rates_table(findings: Findings) -> str:
    """MIoU at every rate, a row for each arm that has several.

    Of several seeds also the highest less the lowest, where none diverged; of one seed that would be noise.
    """
    arms: dict[str, dict[float, float]] = {}
    for setting in findings.finished:
        if setting.rate is not None:
            arms.setdefault(setting.arm, {})[setting.rate] = mean(setting.last)
    for arm, rate in findings.diverged:
        if rate is not None:
            arms.setdefault(arm, {})[rate] = math.nan
    several = {arm: dict(sorted(values.items())) for arm, values in arms.items() if len(values) > 1}
    if not several:
        return ""
    widest, seeds = max(map(len, several.values())), len(findings.finished[0].seeds) if findings.finished else 1
    rows = []
    for arm, values in several.items():
        cells = [f"{figure(value) or 'diverged'} ({rate:g})" for rate, value in values.items()]
        row = [arm, *cells, *[""] * (widest - len(cells))]
        if seeds > 1:
            whole = not any(map(math.isnan, values.values()))
            row.append(figure(max(values.values()) - min(values.values())) if whole else "")
        rows.append(row)
    heads = ["method", *(f"rate {place + 1}" for place in range(widest))]
    told = f"Means over {seeds} seeds of the training." if seeds > 1 else ONE_SEED
    return f"{markdown_table([*heads, *(['highest - lowest'] if seeds > 1 else [])], rows)}\n{told}\n"


def cell(setting: Setting, key: str = MIOU) -> str:
    """A score of a setting's last step with its spread."""
    deviation = spread(setting.last, key)
    return figure(mean(setting.last, key), key) + ("" if deviation is None else f" ± {figure(deviation, key)}")


def figure(value: float | None, key: str = MIOU) -> str:
    """A score's value, with as many digits as mean something."""
    return number(value, f".{DIGITS.get(key, 3)}f")


def steps_caption(settings: Iterable[Setting]) -> str:
    """Of how many seeds the points of :func:`panels` are; those of an unfinished study may differ."""
    counts = {len(rows) for setting in settings for rows in setting.steps.values()}
    fewest, most = min(counts, default=1), max(counts, default=1)
    if most < 2:
        return ONE_SEED
    span = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"Means over {span} seeds of the training."


def differences_table(found: Sequence[Comparison]) -> str:
    """A row for each comparison, and what its interval is over."""
    if not found:
        return "nothing can be compared yet\n"
    rows = [[each.arm, each.rival, *comparison_cells(each)[:3]] for each in found]
    heads = ["method", "minus", f"difference in {MEASURES[MIOU].title}, 95 % interval", "p (Holm)", "seeds"]
    return f"{markdown_table(heads, rows, (0, 1))}\n{difference_caption(found)}\n"


def difference_caption(found: Sequence[Comparison]) -> str:
    """What the intervals are over."""
    if max(each.difference.units for each in found) < 2:
        return ONE_SEED
    return (
        f"Intervals: Student's t over the seeds of the training, within which methods are compared; "
        f"p is corrected for {len(found)} comparisons. The rate of a method is the best of these results."
    )
