"""From the results of all jobs to one row per arm: means over subjects, their intervals, the arms compared.

The unit is the subject (:mod:`ether_diffusion.evaluation.statistics`): seeds are averaged within it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NotRequired, TypedDict

from ether_diffusion.evaluation.runner import Job
from ether_diffusion.evaluation.statistics import Comparison, against_leader, mean_interval
from ether_diffusion.evaluation.subjects.settings import ANCHORS, BASE, COPIES
from ether_diffusion.metrics.choosing import rank
from ether_diffusion.page.text import number
from ether_diffusion.reading import DamagedFileError, matches, read_json, shown


@dataclass(frozen=True)
class Metric:
    """One score.

    Attributes:
        key: its key in the rows of a result.
        title: as people write it.
        rows: the rows of a result that hold it: "images", "prompts", "class_images" or "unrelated".
        higher_is_better: whether more is better; None where it depends on what one wants.
        instead: a score that tables show in its place where it is known.
    """

    key: str
    title: str
    rows: str = "images"
    higher_is_better: bool | None = True
    instead: str | None = None

    @property
    def heading(self) -> str:
        """The title with an arrow to the better side."""
        return self.title + {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]


SCALED = "_scaled"
METRICS = (
    Metric("truth", "truth-likeness"),
    Metric("dino", "DINO"),
    Metric("dino_nearest", "nearest reference", higher_is_better=None),
    Metric("clip_i", "CLIP-I"),
    Metric("clip_t", "CLIP-T"),
    Metric("clip_t_written", "CLIP-T, as written", instead="clip_t"),
    Metric("truth_lpips", "LPIPS to the truth", higher_is_better=False),
    Metric("lpips", "LPIPS", higher_is_better=None),
    Metric("div", "DIV", "prompts"),
    Metric("pres", "PRES", "class_images", higher_is_better=False, instead=f"pres{SCALED}"),
    Metric(f"pres{SCALED}", "PRES, scaled", "class_images", higher_is_better=False),
    Metric("drift", "drift", "unrelated", higher_is_better=False, instead=f"drift{SCALED}"),
    Metric(f"drift{SCALED}", "drift, scaled", "unrelated", higher_is_better=False),
)
"""All scores, each defined where it is computed: :mod:`ether_diffusion.metrics.scoring`; the scaled ones in
:func:`with_scale`."""
BY_KEY = {metric.key: metric for metric in METRICS}
KEPT_CLIP_T = 0.75
"""Share of the base's CLIP-T that a learning rate must keep to be the best by DINO."""
REAL = "real images"
"""The row of the subjects' own images among themselves."""

Result = dict[str, Any]
Row = dict[str, Any]


def read_results(folder: Path, jobs: Iterable[Job[Any]]) -> tuple[list[Result], list[str]]:
    """The results of the jobs that are done, in their order, and the keys of those that are not."""
    results, missing = [], []
    for job in jobs:
        path = folder / "results" / f"{job.key}.json"
        if path.is_file():
            results.append(read_result(path))
        else:
            missing.append(job.key)
    return results, missing


class _Recorded(TypedDict):
    """What every result has."""

    arm: str
    learning_rate: float | None
    subject: str
    seed: int
    judges: dict[str, object]
    images: list[dict[str, object]]
    settings_hash: NotRequired[str]
    base_hash: NotRequired[str | None]
    base_hashes: NotRequired[dict[str, str | None]]
    judged_by: NotRequired[dict[str, object]]
    at: NotRequired[dict[str, list[dict[str, object]]]]
    diverged: NotRequired[str]


def read_result(path: Path) -> Result:
    """One result's file.

    Raises:
        DamagedFileError: it is no result; the message names it. Without the file its job is done again.
    """
    result: Result = read_json(path, _Recorded)
    for metric in METRICS:
        rows = result.get(metric.rows, [])
        if not matches(rows, list[dict[str, object]]):
            raise DamagedFileError(f"{path} is damaged: its {metric.rows} are {shown(rows)}")
        if wrong := [row[metric.key] for row in rows if not isinstance(row.get(metric.key, 0.0), int | float)]:
            raise DamagedFileError(f"{path} is damaged: a {metric.key} of its {metric.rows} is {shown(wrong[0])}")
    return result


def all_results(folder: Path) -> list[Result]:
    """All results in a benchmark's folder: subject by subject, the anchors first, by ascending learning rates."""
    results: list[Result] = [read_result(path) for path in sorted((folder / "results").rglob("*.json"))]
    return sorted(results, key=lambda r: (r["subject"], arm_order(r["arm"]), r["learning_rate"] or 0.0, r["seed"]))


def arm_order(arm: str) -> tuple[int, str]:
    """Sorts the anchors before the methods."""
    return (list(ANCHORS).index(arm), "") if arm in ANCHORS else (len(ANCHORS), arm)


def with_scale(results: list[Result]) -> list[Result]:
    """The results with PRES and drift on a scale of their subject: 0 is the base, 1 copies of the references.

    A result whose subject lacks one of the two anchors stays as it is.
    """
    scaled = results
    for key in ("pres", "drift"):
        rows, anchors = BY_KEY[key].rows, {}
        for arm in (BASE, COPIES):
            anchors[arm] = unit_values([r for r in results if r["arm"] == arm], BY_KEY[key])
        done = []
        for result in scaled:
            floor, ceiling = (anchors[arm].get(result["subject"]) for arm in (BASE, COPIES))
            if floor is not None and ceiling is not None and floor != ceiling:
                span = ceiling - floor
                values = [row | {key + SCALED: (row[key] - floor) / span} for row in result.get(rows, [])]
                result = result | {rows: values}
            done.append(result)
        scaled = done
    return scaled


def summarize(results: list[Result]) -> list[Row]:
    """One row per arm and learning rate, after one of the subjects' real images.

    A subject's score is the mean over seeds of the mean of its images; the arm's is the mean of its subjects, with
    Student's t interval over subjects (``low``, ``high``; None for one subject). ``spread`` is the standard deviation,
    over seeds, of the mean of the subjects that all seeds have: None for one seed. ``diverged`` counts trainings that
    ended without a result. A score that no result of the arm has is not in its row.
    """
    arms: dict[tuple[str, float | None], list[Result]] = {}
    for result in with_scale(results):
        arms.setdefault((result["arm"], result["learning_rate"]), []).append(result)
    rows = _real_images(results)
    for (arm, rate), of_arm in arms.items():
        row: Row = {"arm": arm, "learning_rate": rate, "scores": {}}
        row["subjects"] = len({result["subject"] for result in of_arm if not result.get("diverged")})
        row["seeds"] = sorted({result["seed"] for result in of_arm})
        row["images"] = sum(len(result["images"]) for result in of_arm)
        row["diverged"] = sum(bool(result.get("diverged")) for result in of_arm)
        row["parameters"] = max((sum(r.get("trained_parameters", {}).values()) for r in of_arm), default=0)
        row["bytes"] = max((r.get("bytes", 0) for r in of_arm), default=0)
        for metric in METRICS:
            if by_subject := unit_values(of_arm, metric):
                row["scores"][metric.key] = _score(by_subject.values(), _spread(of_arm, metric))
        if distances := [result["distances"] for result in of_arm if "distances" in result]:
            row["distances"] = {
                name: fmean(each[name] for each in distances) for name in distances[0] if distances[0][name] is not None
            }
        rows.append(row)
    return rows


def at_strength(results: Iterable[Result], strength: float) -> list[Result]:
    """The results as they are at another strength, of the methods that drew at it: the subject's images alone."""
    key = f"{strength:g}"
    others = tuple(metric.rows for metric in METRICS if metric.rows != "images")
    return [
        {name: value for name, value in result.items() if name not in others} | {"images": result["at"][key]}
        for result in results
        if key in result.get("at", {})
    ]


def strengths_in(results: Iterable[Result]) -> list[float]:
    """The strengths that some result has beside 1, ascending."""
    return sorted({float(key) for result in results for key in result.get("at", {})})


@dataclass(frozen=True)
class AtStrength:
    """A method at one strength.

    Attributes:
        row: of :func:`summarize`.
        strength: 1 is as it was trained.
        on_front: whether no other method at any strength is better in one of the two scores and as good in the other.
    """

    row: Row
    strength: float
    on_front: bool


def strength_points(results: list[Result]) -> list[AtStrength]:
    """Every method at every strength at which it drew, by its name and ascending strengths.

    The front is that of the score that decides and CLIP-T, over all methods: a strength needs no training. A
    method of which a training diverged, or that has no CLIP-T, is left out.
    """
    known = [(1.0, results)] + [(s, at_strength(results, s)) for s in strengths_in(results)]
    found = [(s, row) for s, each in known for row in summarize(each) if row["arm"] not in (REAL, *ANCHORS)]
    deciding = primary(summarize(results)).key
    found = [(s, row) for s, row in found if not row["diverged"] and {deciding, "clip_t"} <= row["scores"].keys()]
    points = [(row["scores"][deciding]["mean"], row["scores"]["clip_t"]["mean"]) for _, row in found]
    return [
        AtStrength(row, s, not any(_dominates(other, point) for other in points))
        for (s, row), point in sorted(
            zip(found, points, strict=True), key=lambda e: (e[0][1]["arm"], e[0][1]["learning_rate"] or 0.0, e[0][0])
        )
    ]


def strength_rows(results: list[Result]) -> list[AtStrength]:
    """The points of :func:`strength_points` of the methods that drew at several strengths."""
    points = strength_points(results)
    several = {_arm_at_rate(each) for each in points if each.strength != 1}
    return [each for each in points if _arm_at_rate(each) in several]


def _arm_at_rate(point: AtStrength) -> tuple[str, float | None]:
    return point.row["arm"], point.row["learning_rate"]


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def unit_values(results: Iterable[Result], metric: Metric) -> dict[str, float]:
    """Of every subject that has the score: the mean over its seeds of the mean of a seed's images."""
    seeds: dict[str, dict[int, list[float]]] = {}
    for result in results:
        if values := [row[metric.key] for row in result.get(metric.rows, []) if metric.key in row]:
            seeds.setdefault(result["subject"], {}).setdefault(result["seed"], []).extend(values)
    return {name: fmean(fmean(values) for values in by_seed.values()) for name, by_seed in seeds.items()}


def _score(by_subject: Iterable[float], spread: float | None = None) -> dict[str, float | None]:
    found = mean_interval(by_subject)
    return {"mean": found.mean, "low": found.low, "high": found.high, "spread": spread}


def _real_images(results: list[Result]) -> list[Row]:
    """The row of the references among themselves: of each subject once, since all its results say the same."""
    real = {result["subject"]: result["real"] for result in results if result.get("real")}
    if not real:
        return []
    keys = [metric.key for metric in METRICS if all(metric.key in scores for scores in real.values())]
    scores = {key: _score(of_subject[key] for of_subject in real.values()) for key in keys}
    counts = {"subjects": len(real), "seeds": [], "images": 0, "diverged": 0, "parameters": 0, "bytes": 0}
    return [{"arm": REAL, "learning_rate": None, **counts, "scores": scores}]


def _spread(results: list[Result], metric: Metric) -> float | None:
    seeds: dict[int, list[Result]] = {}
    for result in results:
        seeds.setdefault(result["seed"], []).append(result)
    means = [unit_values(of_seed, metric) for of_seed in seeds.values()]
    shared = set.intersection(*(set(each) for each in means))
    if len(means) < 2 or not shared:
        return None
    return stdev(fmean(each[name] for name in sorted(shared)) for each in means)


def primary(rows: Iterable[Row]) -> Metric:
    """The score that decides: truth-likeness where the truth is known, otherwise DINO to the references."""
    return BY_KEY["truth" if any("truth" in row["scores"] for row in rows) else "dino"]


def best_rates(rows: list[Row]) -> list[Row]:
    """Of every arm the row at its best learning rate, among those where nothing diverged.

    By truth-likeness where the truth is known. DINO alone would reward copies of the references, so by DINO only rates
    count whose CLIP-T keeps :data:`KEPT_CLIP_T` of the base's; of an arm without such a rate, the one that keeps most.
    Of equal rates the lowest, whatever the order of the rows.
    """
    metric = primary(rows)
    base = next((row["scores"].get("clip_t") for row in rows if row["arm"] == BASE), None)
    floor = KEPT_CLIP_T * base["mean"] if metric.key == "dino" and base is not None else None

    def place(row: Row) -> tuple[tuple[bool, float], float]:
        clip_t = row["scores"].get("clip_t")
        key = rank(row["scores"][metric.key]["mean"], None if clip_t is None else clip_t["mean"], floor)
        return key, -(row["learning_rate"] or 0.0)

    best: dict[str, Row] = {}
    for row in rows:
        known = metric.key in row["scores"] and not row["diverged"]
        if known and (row["arm"] not in best or place(row) > place(best[row["arm"]])):
            best[row["arm"]] = row
    return list(best.values())


def arm_title(row: Row) -> str:
    """The arm of a row and its learning rate: ``lora, 0.001``."""
    return str(row["arm"]) if row["learning_rate"] is None else f"{row['arm']}, {number(row['learning_rate'], 'g')}"


def comparisons(results: list[Result]) -> list[Comparison]:
    """The best method by the primary score against each other method, paired by subject, with Holm's correction.

    Anchors are not compared, nor are arms with several learning rates, whose best was chosen from these results.
    """
    by_arm: dict[str, list[Result]] = {}
    for result in results:
        if result["arm"] not in ANCHORS:
            by_arm.setdefault(result["arm"], []).append(result)
    single = {arm: of_arm for arm, of_arm in by_arm.items() if len({r["learning_rate"] for r in of_arm}) == 1}
    metric = primary(summarize(results))
    return against_leader({arm: unit_values(of_arm, metric) for arm, of_arm in single.items()})


def facts_of(results: list[Result], missing: list[str]) -> Mapping[str, Any]:
    """What ``summary.json`` holds: rows, comparisons, the score that they are of, judges and what is missing."""
    rows = summarize(results)
    return {
        "rows": rows,
        "primary": primary(rows).key,
        "comparisons": [asdict(each) for each in comparisons(results)],
        "missing": missing,
        "judges": results[0]["judges"] if results else {},
    }
