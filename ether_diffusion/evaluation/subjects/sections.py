"""What the page of many runs shows of a benchmark: its tables, and every subject with its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ether_diffusion.evaluation.curves import rate_curves
from ether_diffusion.evaluation.subjects.costs import Steps, costs, steps_caption
from ether_diffusion.evaluation.subjects.found import Benchmark
from ether_diffusion.evaluation.subjects.settings import ANCHORS
from ether_diffusion.evaluation.subjects.strengths import front_figure, strength_pictures
from ether_diffusion.evaluation.subjects.summary import (
    BY_KEY,
    AtStrength,
    Metric,
    Result,
    arm_title,
    comparisons,
    strength_points,
    strength_rows,
)
from ether_diffusion.evaluation.subjects.tuning import tuned_against_default, tunings
from ether_diffusion.evaluation.tables import caption, shown_metrics
from ether_diffusion.page.pictures import Picture, thumbnail
from ether_diffusion.registry import title_of
from ether_diffusion.runs.report import evenly_spaced, shown_setting
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

MAX_PICTURES = 1500
"""In the page; of a greater benchmark fewer prompts of each subject are shown, and the page says so."""
THUMBNAIL = 128
MAX_REFERENCES = 6


@dataclass(frozen=True)
class PromptRow:
    """One prompt of a subject: of every arm a picture, and its scores in the order of :func:`by_subject`."""

    prompt: str
    cells: list[tuple[Picture | None, list[float | None]]]


@dataclass(frozen=True)
class SubjectSection:
    """A subject: its references, its means for every arm, and its prompts; ``left_out`` prompts are not shown."""

    name: str
    references: list[Picture]
    means: list[list[float | None]]
    prompts: list[PromptRow]
    left_out: int


def section(benchmark: Benchmark) -> dict[str, Any]:
    """What the template shows of a benchmark."""
    compared = comparisons(benchmark.results)
    return {
        "benchmark": benchmark,
        "metrics": shown_metrics(benchmark.rows),
        "by_subject": by_subject(benchmark),
        "compared": compared,
        "caption": caption(benchmark.rows, compared),
        "arms": [(row["arm"], arm_title(row)) for row in benchmark.shown_arms],
        "subjects": subject_sections(benchmark),
        "curves": rate_curves(benchmark, by_subject(benchmark)),
        "settings": {key: shown_setting(key, value) for key, value in benchmark.settings.items()},
        "record": record(benchmark),
    }


def beside_scores(benchmark: Benchmark, steps: Steps | None) -> dict[str, Any]:
    """Costs, strengths and settings of a benchmark, and the words by which its methods are found."""
    best = {(row["arm"], row["learning_rate"]) for row in benchmark.shown_arms}
    at_best = [result for result in benchmark.results if (result["arm"], result["learning_rate"]) in best]
    points, shown = strength_points(at_best), strength_rows(at_best)
    known = tunings(benchmark.results, benchmark.rows)

    def results_at(point: AtStrength, subject: str) -> list[Result]:
        return benchmark.results_of(point.row, subject)

    subjects = benchmark.subjects[: max(1, MAX_PICTURES // max(1, len(shown)))]
    return {
        "methods": method_words(benchmark),
        "costs": costs(benchmark.rows, steps),
        "steps": None if steps is None else steps_caption(steps),
        "points": points,
        "front": front_figure(points, benchmark.primary, benchmark.name) if points else None,
        "at_strengths": shown,
        "strength_pictures": strength_pictures(shown, subjects, results_at, benchmark.picture, THUMBNAIL),
        "tunings": known,
        "tuned": tuned_against_default(benchmark.results, known, benchmark.primary),
    }


def method_words(benchmark: Benchmark) -> dict[str, str]:
    """By arm the words by which the page's filter finds it: its name, and its method's title or what the anchor is."""
    found = {}
    for row in benchmark.rows:
        arm = row["arm"]
        settings = next((r["settings"] for r in benchmark.results if r["arm"] == arm and r.get("settings")), None)
        title = ANCHORS.get(arm, "") if settings is None else title_of({"method": DreamBoothConfig.method, **settings})
        found[arm] = f"{arm} {title}".strip()
    return found


def record(benchmark: Benchmark) -> dict[str, str]:
    """What the results depend on beside the settings, as far as they say it: hashes, and settings of each arm."""
    found: dict[str, list[str]] = {}
    for result in benchmark.results:
        for key, title in (("settings_hash", "Hash of the settings"), ("base_hash", "Hash of the base")):
            if value := result.get(key):
                found.setdefault(f"{title}, {result['arm']}" if key == "settings_hash" else title, []).append(value)
        if settings := result.get("settings"):
            said = ", ".join(f"{name} {shown_setting(name, value)}" for name, value in settings.items())
            found.setdefault(f"Settings, {result['arm']}", []).append(said)
    return {title: "; ".join(sorted(set(values))) for title, values in sorted(found.items())}


def by_subject(benchmark: Benchmark) -> tuple[Metric, Metric]:
    """The scores that are shown for every subject and prompt: the one that decides, and CLIP-T."""
    return benchmark.primary, BY_KEY["clip_t"]


def subject_sections(benchmark: Benchmark) -> list[SubjectSection]:
    """Every subject with the arms at their best learning rate beside each other."""
    arms, sections = benchmark.shown_arms, []
    prompts = max((len(prompts_of(r)) for r in benchmark.results), default=0)
    wanted = max(1, MAX_PICTURES // max(1, len(arms) * len(benchmark.subjects)))
    for subject in benchmark.subjects:
        of_arms = [benchmark.results_of(row, subject) for row in arms]
        asked = list(dict.fromkeys(prompt for results in of_arms for r in results for prompt in prompts_of(r)))
        shown = [asked[index] for index in evenly_spaced(range(len(asked)), min(wanted, prompts))]
        sections.append(
            SubjectSection(
                subject,
                _references(benchmark, subject),
                [[_mean(results, metric) for metric in by_subject(benchmark)] for results in of_arms],
                [PromptRow(p, [_cell(benchmark, results, p) for results in of_arms]) for p in shown],
                len(asked) - len(shown),
            )
        )
    return sections


def _references(benchmark: Benchmark, subject: str) -> list[Picture]:
    """The subject's own pictures, as far as they are still where they were scored."""
    result = next(result for result in benchmark.results if result["subject"] == subject)
    paths = [Path(path) for path in result.get("references", ())][:MAX_REFERENCES]
    return [Picture(thumbnail(path, THUMBNAIL), f"Reference {path.name}", path.name) for path in paths]


def _mean(results: list[Result], metric: Metric, prompt: str | None = None) -> float | None:
    rows = [row for result in results for row in result["images"] if prompt is None or row.get("prompt") == prompt]
    values = [row[metric.key] for row in rows if metric.key in row]
    return fmean(values) if values else None


def _cell(benchmark: Benchmark, results: list[Result], prompt: str) -> tuple[Picture | None, list[float | None]]:
    """The first picture for the prompt, and the means of all of them."""
    scores = [_mean(results, metric, prompt) for metric in by_subject(benchmark)]
    for result in results:
        if (path := picture_for(benchmark, result, prompt)) is not None:
            asked = f"{prompt}, seed {result['seed']}"
            return Picture(thumbnail(path, THUMBNAIL), f"{result['arm']}: {asked}", asked), scores
    return None, scores


def prompts_of(result: Result) -> list[str]:
    """The prompts of a result, each once, in their order."""
    return list(dict.fromkeys(row["prompt"] for row in result["images"] if "prompt" in row))


def picture_for(benchmark: Benchmark, result: Result, prompt: str) -> Path | None:
    """The first picture for a prompt."""
    files = (row["file"] for row in result["images"] if row.get("prompt") == prompt)
    return next((benchmark.picture(result, file) for file in files), None)
