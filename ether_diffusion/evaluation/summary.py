"""From the results of all jobs to one table with intervals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ether_diffusion.evaluation.jobs import BASE, Job
from ether_diffusion.files import write_text


@dataclass(frozen=True)
class Metric:
    """One score.

    Attributes:
        key: its key in the rows of a result.
        title: as people write it.
        rows: the rows of a result that hold it: "images", "prompts", "class_images" or "unrelated".
        higher_is_better: whether more is better; None where it depends on what one wants.
    """

    key: str
    title: str
    rows: str = "images"
    higher_is_better: bool | None = True


METRICS = (
    Metric("dino", "DINO"),
    Metric("clip_i", "CLIP-I"),
    Metric("clip_t", "CLIP-T"),
    Metric("clip_t_written", "CLIP-T, as written"),
    Metric("lpips", "LPIPS", higher_is_better=None),
    Metric("div", "DIV", "prompts"),
    Metric("pres", "PRES", "class_images", higher_is_better=False),
    Metric("drift", "drift", "unrelated", higher_is_better=False),
)
"""All scores, each defined where it is computed: :mod:`ether_diffusion.metrics.scoring`."""
RESAMPLES = 2000
GROUPS = 3
"""So many subjects say something of how subjects differ."""
REAL = "real images"
"""The row of the subjects' own images among themselves."""

Result = dict[str, Any]


def read_results(folder: Path, jobs: Iterable[Job]) -> tuple[list[Result], list[str]]:
    """The results of the jobs that are done, in their order, and the keys of those that are not."""
    results, missing = [], []
    for job in jobs:
        path = folder / "results" / f"{job.key}.json"
        if path.is_file():
            results.append(json.loads(path.read_text()))
        else:
            missing.append(job.key)
    return results, missing


def all_results(folder: Path) -> list[Result]:
    """All results in a benchmark's folder: subject by subject, the base first, by ascending learning rates."""
    paths = sorted((folder / "results").rglob("*.json"))
    results: list[Result] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(
        results, key=lambda r: (r["subject"], r["arm"] != BASE, r["arm"], r["learning_rate"] or 0.0, r["seed"])
    )


def bootstrap(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of the groups' means by the percentile bootstrap; the same for the same values.

    Of three and more groups the groups are resampled; fewer say nothing of how groups differ, and the values within
    each are resampled instead.

    Args:
        groups: the values of each subject.
        seed: of the resamples.

    Raises:
        ValueError: there are none.
    """
    if not groups or not all(len(values) for values in groups):
        raise ValueError("no values to resample")
    dice = np.random.default_rng(seed)
    if len(groups) >= GROUPS:
        means = np.array([np.mean(values) for values in groups])
        draws = dice.choice(means, (RESAMPLES, len(means))).mean(1)
    else:
        within = [dice.choice(np.asarray(values, np.float64), (RESAMPLES, len(values))).mean(1) for values in groups]
        draws = np.mean(within, axis=0)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def summarize(results: list[Result]) -> list[dict[str, Any]]:
    """One row per arm and learning rate, after one of the subjects' real images.

    A subject's score is the mean of its images over all seeds; the arm's is the mean of its subjects, with the interval
    of :func:`bootstrap`. ``spread`` is the standard deviation, over seeds, of the mean of the subjects that all seeds
    have: None for one seed. ``diverged`` counts trainings that ended without a result. A score that no result of the
    arm has is not in its row.
    """
    arms: dict[tuple[str, float | None], list[Result]] = {}
    for result in results:
        arms.setdefault((result["arm"], result["learning_rate"]), []).append(result)
    rows = _real_images(results)
    for (arm, rate), of_arm in arms.items():
        row: dict[str, Any] = {"arm": arm, "learning_rate": rate, "scores": {}}
        row["subjects"] = len({result["subject"] for result in of_arm if not result.get("diverged")})
        row["seeds"] = sorted({result["seed"] for result in of_arm})
        row["images"] = sum(len(result["images"]) for result in of_arm)
        row["diverged"] = sum(bool(result.get("diverged")) for result in of_arm)
        row["parameters"] = max((sum(r.get("trained_parameters", {}).values()) for r in of_arm), default=0)
        for metric in METRICS:
            if by_subject := _values(of_arm, metric, "subject"):
                row["scores"][metric.key] = score(list(by_subject.values()), _spread(of_arm, metric))
        if distances := [result["distances"] for result in of_arm if "distances" in result]:
            row["distances"] = {
                name: float(np.mean([each[name] for each in distances]))
                for name in distances[0]
                if distances[0][name] is not None
            }
        rows.append(row)
    return rows


def score(by_subject: Sequence[Sequence[float]], spread: float | None = None) -> dict[str, float | None]:
    """Mean over the subjects of their means, its 95% interval, and what it varies by over seeds.

    One value of each of fewer than three subjects has no interval: ``low`` and ``high`` are None.
    """
    several = len(by_subject) >= GROUPS or any(len(values) > 1 for values in by_subject)
    low, high = bootstrap(by_subject) if several else (None, None)
    mean = float(np.mean([np.mean(values) for values in by_subject]))
    return {"mean": mean, "low": low, "high": high, "spread": spread}


def subject_means(results: list[Result], metric: Metric) -> dict[str, float]:
    """Of every subject the mean of its images over all results; a subject without that score is left out."""
    return {name: float(np.mean(values)) for name, values in _values(results, metric, "subject").items()}


def _real_images(results: list[Result]) -> list[dict[str, Any]]:
    """The row of the references among themselves: of each subject once, since all its results say the same."""
    real = {result["subject"]: result["real"] for result in results if result.get("real")}
    if not real:
        return []
    keys = [metric.key for metric in METRICS if all(metric.key in scores for scores in real.values())]
    scores = {key: score([[of_subject[key]] for of_subject in real.values()]) for key in keys}
    counts = {"subjects": len(real), "seeds": [], "images": 0, "diverged": 0, "parameters": 0}
    return [{"arm": REAL, "learning_rate": None, **counts, "scores": scores}]


def _values(results: list[Result], metric: Metric, key: str) -> dict[Any, list[float]]:
    groups: dict[Any, list[float]] = {}
    for result in results:
        values = [row[metric.key] for row in result.get(metric.rows, []) if metric.key in row]
        if values:
            groups.setdefault(result[key], []).extend(values)
    return groups


def _spread(results: list[Result], metric: Metric) -> float | None:
    seeds: dict[int, list[Result]] = {}
    for result in results:
        seeds.setdefault(result["seed"], []).append(result)
    means = [subject_means(of_seed, metric) for of_seed in seeds.values()]
    shared = set.intersection(*(set(each) for each in means))
    if len(means) < 2 or not shared:
        return None
    return float(np.std([np.mean([each[name] for name in sorted(shared)]) for each in means], ddof=1))


def best_rates(rows: list[dict[str, Any]], metric: str = "dino") -> list[dict[str, Any]]:
    """Of every arm the row with the highest ``metric``, among those where nothing diverged."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = best.get(row["arm"])
        if metric not in row["scores"] or row["diverged"]:
            continue
        if known is None or row["scores"][metric]["mean"] > known["scores"][metric]["mean"]:
            best[row["arm"]] = row
    return list(best.values())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: means, 95% intervals over subjects, ± the spread over seeds."""
    shown = [metric for metric in METRICS if any(metric.key in row["scores"] for row in rows)]
    arrows = {True: " ↑", False: " ↓", None: ""}
    titles = [metric.title + arrows[metric.higher_is_better] for metric in shown]
    lines = ["| method | learning rate | parameters | " + " | ".join(titles) + " |"]
    lines.append("|---|---:|---:|" + "---|" * len(shown))
    for row in rows:
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        parameters = f"{row['parameters']:,}" if row["parameters"] else ""
        cells = [format_score(row["scores"].get(metric.key)) for metric in shown]
        note = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        lines.append(f"| {row['arm']}{note} | {rate} | {parameters} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def format_score(found: dict[str, float | None] | None) -> str:
    """A score with its spread and interval: ``0.412 ± 0.010 [0.380, 0.441]``; nothing where there is none."""
    if found is None:
        return ""
    spread = "" if found["spread"] is None else f" ± {found['spread']:.3f}"
    interval = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['mean']:.3f}{spread}{interval}"


def write_summary(folder: Path, jobs: list[Job]) -> tuple[str, list[str]]:
    """Write ``scores.jsonl``, ``summary.json`` and ``summary.md`` of the jobs that are done.

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
    """Write ``scores.jsonl`` (a line per image), ``summary.json`` and ``summary.md``, whose text is returned."""
    common = ("arm", "learning_rate", "subject", "seed", "judges", "references")
    rows = summarize(results)
    text = markdown(rows)
    if missing:
        text += f"\nNot in this table ({len(missing)}): {', '.join(missing)}\n"
    lines = [
        json.dumps({name: result.get(name) for name in common} | {"kind": kind} | row)
        for result in results
        for kind in dict.fromkeys(metric.rows for metric in METRICS)
        for row in result.get(kind, [])
    ]
    judges = results[0]["judges"] if results else {}
    write_text(folder / "scores.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(folder / "summary.json", json.dumps({"rows": rows, "missing": missing, "judges": judges}, indent=1))
    write_text(folder / "summary.md", text)
    return text
