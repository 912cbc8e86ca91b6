"""From the results of all jobs to one table with intervals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ether_diffusion.evaluation.jobs import Job
from ether_diffusion.files import write_text

METRICS = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "clip_t_written": "CLIP-T, as written",
}
RESAMPLES = 2000

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


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean by the percentile bootstrap over ``values``; the same for the same values.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no values to resample")
    draws = np.random.default_rng(seed).choice(np.asarray(values, np.float64), (RESAMPLES, len(values)))
    low, high = np.percentile(draws.mean(1), [2.5, 97.5])
    return float(low), float(high)


def summarize(results: list[Result]) -> list[dict[str, Any]]:
    """One row per arm and learning rate.

    A subject's score is the mean of its images over all seeds; the arm's is the mean of its subjects, its interval the
    bootstrap over subjects. ``spread`` is the standard deviation, over seeds, of the mean of all subjects: None for one
    seed.
    """
    arms: dict[tuple[str, float | None], list[Result]] = {}
    for result in results:
        arms.setdefault((result["arm"], result["learning_rate"]), []).append(result)
    rows = []
    for (arm, rate), of_arm in arms.items():
        row: dict[str, Any] = {"arm": arm, "learning_rate": rate, "scores": {}}
        row["subjects"] = len({result["subject"] for result in of_arm})
        row["seeds"] = sorted({result["seed"] for result in of_arm})
        row["images"] = sum(len(result["images"]) for result in of_arm)
        row["parameters"] = max((sum(r.get("trained_parameters", {}).values()) for r in of_arm), default=0)
        for metric in METRICS:
            by_subject = _means(of_arm, metric, "subject")
            by_seed = _means(of_arm, metric, "seed")
            low, high = bootstrap(by_subject)
            row["scores"][metric] = {
                "mean": float(np.mean(by_subject)),
                "low": low,
                "high": high,
                "spread": float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
            }
        rows.append(row)
    return rows


def _means(results: list[Result], metric: str, key: str) -> list[float]:
    groups: dict[Any, list[float]] = {}
    for result in results:
        groups.setdefault(result[key], []).extend(image[metric] for image in result["images"])
    return [float(np.mean(values)) for values in groups.values()]


def best_rates(rows: list[dict[str, Any]], metric: str = "dino") -> list[dict[str, Any]]:
    """Of every arm the row with the highest ``metric``."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = best.get(row["arm"])
        if known is None or row["scores"][metric]["mean"] > known["scores"][metric]["mean"]:
            best[row["arm"]] = row
    return list(best.values())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: means, 95% intervals over subjects, ± the spread over seeds."""
    lines = ["| method | learning rate | parameters | " + " | ".join(METRICS.values()) + " |"]
    lines.append("|---|---:|---:|" + "---|" * len(METRICS))
    for row in rows:
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        parameters = f"{row['parameters']:,}" if row["parameters"] else ""
        cells = [_cell(row["scores"][metric]) for metric in METRICS]
        lines.append(f"| {row['arm']} | {rate} | {parameters} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(score: dict[str, float | None]) -> str:
    spread = "" if score["spread"] is None else f" ± {score['spread']:.3f}"
    return f"{score['mean']:.3f}{spread} [{score['low']:.3f}, {score['high']:.3f}]"


def write_summary(folder: Path, jobs: list[Job]) -> str:
    """Write ``scores.jsonl`` (a line per image), ``summary.json`` and ``summary.md``; return the latter's text.

    Jobs that are not done are named in all of them but the first.
    """
    results, missing = read_results(folder, jobs)
    common = ("arm", "learning_rate", "subject", "seed", "judges")
    lines = [
        json.dumps({name: result[name] for name in common} | image) for result in results for image in result["images"]
    ]
    rows = summarize(results)
    text = markdown(rows)
    if missing:
        text += f"\n{len(missing)} of {len(jobs)} jobs are not in this table: {', '.join(missing)}\n"
    write_text(folder / "scores.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(folder / "summary.json", json.dumps({"rows": rows, "missing": missing}, indent=1))
    write_text(folder / "summary.md", text)
    return text
