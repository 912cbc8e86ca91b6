"""From the results of all jobs to one table with intervals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ether_diffusion.evaluation.jobs import Job
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
    """One row per arm and learning rate, after one of the subjects' real images.

    A subject's score is the mean of its images over all seeds; the arm's is the mean of its subjects, its interval the
    bootstrap over subjects. ``spread`` is the standard deviation, over seeds, of the mean of all subjects: None for one
    seed. A score that no result of the arm has is not in its row.
    """
    arms: dict[tuple[str, float | None], list[Result]] = {}
    for result in results:
        arms.setdefault((result["arm"], result["learning_rate"]), []).append(result)
    rows = _real_images(results)
    for (arm, rate), of_arm in arms.items():
        row: dict[str, Any] = {"arm": arm, "learning_rate": rate, "scores": {}}
        row["subjects"] = len({result["subject"] for result in of_arm})
        row["seeds"] = sorted({result["seed"] for result in of_arm})
        row["images"] = sum(len(result["images"]) for result in of_arm)
        row["parameters"] = max((sum(r.get("trained_parameters", {}).values()) for r in of_arm), default=0)
        row["scores"] = {
            metric.key: score(list(by_subject.values()), list(_means(of_arm, metric, "seed").values()))
            for metric in METRICS
            if (by_subject := _means(of_arm, metric, "subject"))
        }
        if distances := [result["distances"] for result in of_arm if "distances" in result]:
            row["distances"] = {
                name: float(np.mean([each[name] for each in distances]))
                for name in distances[0]
                if distances[0][name] is not None
            }
        rows.append(row)
    return rows


def score(by_subject: Sequence[float], by_seed: Sequence[float] = ()) -> dict[str, float | None]:
    """Mean over subjects, its 95% interval, the standard deviation over seeds (None for fewer than two)."""
    low, high = bootstrap(by_subject)
    spread = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    return {"mean": float(np.mean(by_subject)), "low": low, "high": high, "spread": spread}


def subject_means(results: list[Result], metric: Metric) -> dict[str, float]:
    """Of every subject the mean of its images over all results; a subject without that score is left out."""
    return _means(results, metric, "subject")


def _real_images(results: list[Result]) -> list[dict[str, Any]]:
    """The row of the references among themselves: of each subject once, since all its results say the same."""
    real = {result["subject"]: result["real"] for result in results if result.get("real")}
    if not real:
        return []
    keys = [metric.key for metric in METRICS if all(metric.key in scores for scores in real.values())]
    scores = {key: score([of_subject[key] for of_subject in real.values()]) for key in keys}
    return [
        {"arm": REAL, "learning_rate": None, "subjects": len(real), "seeds": [], "images": 0, "parameters": 0}
        | {"scores": scores}
    ]


def _means(results: list[Result], metric: Metric, key: str) -> dict[Any, float]:
    groups: dict[Any, list[float]] = {}
    for result in results:
        values = [row[metric.key] for row in result.get(metric.rows, []) if metric.key in row]
        if values:
            groups.setdefault(result[key], []).extend(values)
    return {name: float(np.mean(values)) for name, values in groups.items()}


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
    shown = [metric for metric in METRICS if any(metric.key in row["scores"] for row in rows)]
    arrows = {True: " ↑", False: " ↓", None: ""}
    titles = [metric.title + arrows[metric.higher_is_better] for metric in shown]
    lines = ["| method | learning rate | parameters | " + " | ".join(titles) + " |"]
    lines.append("|---|---:|---:|" + "---|" * len(shown))
    for row in rows:
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        parameters = f"{row['parameters']:,}" if row["parameters"] else ""
        cells = [format_score(row["scores"].get(metric.key)) for metric in shown]
        lines.append(f"| {row['arm']} | {rate} | {parameters} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def format_score(found: dict[str, float | None] | None) -> str:
    """A score with its spread and interval: ``0.412 ± 0.010 [0.380, 0.441]``; nothing where there is none."""
    if found is None:
        return ""
    spread = "" if found["spread"] is None else f" ± {found['spread']:.3f}"
    return f"{found['mean']:.3f}{spread} [{found['low']:.3f}, {found['high']:.3f}]"


def write_summary(folder: Path, jobs: list[Job]) -> str:
    """Write ``scores.jsonl``, ``summary.json`` and ``summary.md`` of the jobs that are done; return the latter's text.

    Jobs that are not done are named in the last two.
    """
    results, missing = read_results(folder, jobs)
    text = write_tables(folder, results, missing)
    if missing:
        text += f"\n{len(missing)} of {len(jobs)} jobs are not in this table: {', '.join(missing)}\n"
        write_text(folder / "summary.md", text)
    return text


def write_tables(folder: Path, results: list[Result], missing: list[str]) -> str:
    """Write ``scores.jsonl`` (a line per image, with its pairs), ``summary.json``, ``summary.md``; return the table."""
    common = ("arm", "learning_rate", "subject", "seed", "judges", "references")
    rows = summarize(results)
    text = markdown(rows)
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
