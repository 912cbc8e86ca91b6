"""A benchmark held against the committed rows of another: on the same jobs, without running those again.

``ether bench --config mine.yaml --output_dir runs/mine --against docs/results/playground.json``. The runs must share
protocol, base, judges and pictures of the world with the file; what differs is refused by name before anything is
trained. The benchmark's own anchors are then held against those of the file, picture by picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ether_diffusion.evaluation.runner import hash_changes
from ether_diffusion.evaluation.settings import ENCODING
from ether_diffusion.evaluation.statistics import Comparison, compare
from ether_diffusion.evaluation.subjects.compact import ASKED, BUDGET, Compact, Protocol, arm_key, read_compact
from ether_diffusion.evaluation.subjects.settings import ANCHORS, Sides, cell_of, committed_name, named_in
from ether_diffusion.evaluation.subjects.summary import METRICS, Result, primary, summarize, unit_values
from ether_diffusion.evaluation.tables import caption, comparison_cells, scores_table
from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table
from ether_diffusion.reading import shown
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

TOLERANCE, ANCHOR_TOLERANCE = 0.05, 0.01
"""How far a picture's score, a cosine, may be from a committed one of the same job: of a training, and of an anchor.

Measured (docs/evaluation.md): of 20 trainings of the committed rows that ran again, 19 were within 0.03 in every score
of every picture, on the same machine within 0.002, and one took another course. With the next quarter decade of the
learning rate, 93 trainings of eight methods differ by at least 0.16 in some picture. Anchors train nothing: the same
machine gives the same digits, a GPU differs by up to 0.004.
"""
TEXT, FOUND = "against.md", "against.json"
"""Files in the benchmark's folder."""


@dataclass(frozen=True)
class Anchor:
    """How far one of the benchmark's own anchors is from that of the file.

    Attributes:
        arm: its name.
        largest: the largest difference of a score of a picture; None where they share no job.
    """

    arm: str
    largest: float | None


def read_rows(path: Path) -> Compact:
    """A file to compare with.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not say what its jobs share, or holds means instead of pictures' scores.
    """
    known = read_compact(path)
    if known.protocol is None:
        raise ValueError(
            f"{path} does not say what its jobs share, so nothing can be compared with it: "
            "ether study table FOLDER FILE writes it anew from the benchmark's folder"
        )
    return known


def differences(theirs: Protocol, ours: Protocol) -> list[str]:
    """What keeps rows of one protocol from being compared with those of another, each by its name."""
    found = [
        f"{key} is {shown(ours['asked'].get(key))}, there {shown(theirs['asked'].get(key))}"
        for key in ASKED
        if ours["asked"].get(key) != theirs["asked"].get(key)
    ]
    for key in ENCODING:
        own, known = (each["training"].get(key, getattr(DreamBoothConfig, key)) for each in (ours, theirs))
        if own != known:
            found.append(f"another encoding of prompts: {key} is {shown(own)}, there {shown(known)}")
    found += [f"another base: {told}" for told in hash_changes(theirs["base_hashes"], ours["base_hashes"])]
    for judge in sorted(theirs["judged_by"].keys() | ours["judged_by"].keys()):
        if theirs["judged_by"].get(judge) != ours["judged_by"].get(judge):
            found.append("the scores are of another version" if judge == "scores" else f"another judge {judge}")
    for subject, own in ours["subjects"].items():
        known = theirs["subjects"].get(subject)
        if known is None:
            found.append(f"it has no subject {subject}; it has {', '.join(theirs['subjects'])}")
            continue
        if known["prompts"] != own["prompts"]:
            found.append(f"other prompts for {subject}")
        for key, what in (("references", "reference pictures"), ("truths", "true pictures")):
            before, now = known.get(key), own.get(key)
            if before is not None and now is not None and before != now:
                found.append(f"another world: other {what} of {subject}")
    return found


def budget_differences(theirs: Protocol, arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where an arm learns for longer or shorter than those of a file, each by its name.

    Args:
        theirs: the file's.
        arms: the settings of the trainings by arm.
    """
    found = []
    for arm, settings in arms.items():
        for key in BUDGET:
            default = getattr(DreamBoothConfig, key)
            own, known = settings.get(key, default), theirs["training"].get(key, default)
            if own != known:
                found.append(f"another budget: {key} of {arm} is {shown(own)}, there {shown(known)}")
    return found


def check_same(rows: Compact, ours: Protocol, arms: Mapping[str, Mapping[str, Any]], seeds: Iterable[int]) -> None:
    """Refuse to compare what does not go together.

    Raises:
        ValueError: protocol, base, judges, world or budget differ, or the file lacks a subject or seed; each is named.
    """
    assert rows.protocol is not None, "read_rows refuses files without it"
    found = differences(rows.protocol, ours) + budget_differences(rows.protocol, arms)
    known = sorted({result["seed"] for result in rows.results})
    found += [f"it has no seed {seed}; it has {', '.join(map(str, known))}" for seed in seeds if seed not in known]
    if found:
        raise ValueError(
            f"{rows.name}.json is of other jobs, so its rows cannot stand beside these: {'; '.join(found)}. "
            "Take its settings, or leave --against out"
        )


def check_named(rows: Compact, comparisons: Mapping[str, Sides], subjects: Iterable[str], seeds: Sequence[int]) -> None:
    """Refuse comparisons with what the file does not have.

    Args:
        rows: the file's.
        comparisons: by their titles. Arms of the file are called as by :func:`committed_name`; others are passed over.
        subjects: of the benchmark: a named arm needs all of them,
        seeds: with each of these.

    Raises:
        ValueError: the file has no such arm, not at that rate, or without some of the jobs.
    """
    methods: dict[str, list[Result]] = {}
    for result in rows.results:
        if result["arm"] not in ANCHORS:
            methods.setdefault(committed_name(result["arm"], rows.name), []).append(result)
    jobs = {(subject, seed) for subject in subjects for seed in seeds}
    for title, cell in ((title, cell) for title, sides in comparisons.items() for cell in named_in(sides, rows.name)):
        arm, rate = cell_of(cell)
        if arm not in methods:
            raise ValueError(f"comparison {title!r} names {cell!r}, of no method of the file: {', '.join(methods)}")
        known = sorted({result["learning_rate"] for result in methods[arm]} - {None})
        if rate is not None and rate not in known:
            told = f"at {', '.join(f'{each:g}' for each in known)}" if known else f"without a rate: write {arm}"
            raise ValueError(f"comparison {title!r} names {cell!r}, and the file has it {told}")
        found = {job_of(result) for result in methods[arm] if rate in (None, result["learning_rate"])}
        if lacking := sorted(jobs - found):
            told = ", ".join(f"{subject} with seed {seed}" for subject, seed in lacking)
            raise ValueError(
                f"comparison {title!r} names {cell!r}, of which the file lacks {told}: leave those out by subjects and "
                "seeds, or leave the comparison out"
            )


def job_of(result: Result) -> tuple[str, int]:
    """The job of a result within its arm: subject and seed."""
    return result["subject"], result["seed"]


def sample_differences(ours: Result, theirs: Result) -> list[float]:
    """The largest difference of the scores of each picture of the subject, in the order of the pictures.

    Raises:
        ValueError: they have not equally many pictures.
    """
    keys = [metric.key for metric in METRICS if metric.rows == "images"]
    try:
        return [
            max((abs(own[key] - known[key]) for key in keys if key in own and key in known), default=0.0)
            for own, known in zip(ours["images"], theirs["images"], strict=True)
        ]
    except ValueError:
        counts = f"{len(ours['images'])} and {len(theirs['images'])}"
        raise ValueError(f"{arm_key(ours)}, {ours['subject']}: {counts} pictures; the file has other jobs") from None


def anchors_against(own: Sequence[Result], rows: Compact) -> list[Anchor]:
    """The benchmark's own anchors beside those of the file."""
    known = {(result["arm"], *job_of(result)): result for result in rows.results}
    found = []
    for arm in ANCHORS:
        mine = [result for result in own if result["arm"] == arm]
        each = [
            max(sample_differences(result, known[key]), default=0.0)
            for result in mine
            if (key := (arm, *job_of(result))) in known
        ]
        if mine:
            found.append(Anchor(arm, max(each, default=None)))
    return found


def foreign(found: Sequence[Anchor]) -> list[str]:
    """The anchors that are not those of the file: with these nothing is compared with it."""
    return [each.arm for each in found if each.largest is not None and each.largest > ANCHOR_TOLERANCE]


def methods_in(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results by arm of methods with one learning rate, whose best was not chosen from these results."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        if result["arm"] not in ANCHORS:
            arms.setdefault(result["arm"], []).append(result)
    return {arm: each for arm, each in arms.items() if len({result["learning_rate"] for result in each}) == 1}


def on_same_jobs(ours: Sequence[Result], theirs: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """Both, of the subjects and seeds that both have finished."""
    shared = set.intersection(*({job_of(r) for r in each if not r.get("diverged")} for each in (ours, theirs)))
    first, second = ([r for r in each if job_of(r) in shared] for each in (ours, theirs))
    return first, second


def compared_with(own: Sequence[Result], rows: Compact) -> list[Comparison]:
    """Each of the benchmark's methods against each of the file's, paired by subject, with Holm's correction."""
    metric = primary(summarize(list(own)))
    arms: dict[str, dict[str, float]] = {}
    pairs, names = [], {}
    for arm, ours in methods_in(own).items():
        for rival, theirs in methods_in(rows.results).items():
            mine, known = on_same_jobs(ours, theirs)
            left, right = f"{arm}\0{rival}", f"{rival}\0{arm}\0"
            arms[left], arms[right] = unit_values(mine, metric), unit_values(known, metric)
            names[left], names[right] = arm, committed_name(rival, rows.name)
            pairs.append((left, right))
    return [replace(each, arm=names[each.arm], rival=names[each.rival]) for each in compare(arms, pairs)]


def beside(own: Sequence[Result], rows: Compact) -> list[Result]:
    """The benchmark's results, and those of the file's methods on the same subjects and seeds."""
    jobs = {job_of(result) for result in own}
    more = [
        result | {"arm": committed_name(result["arm"], rows.name)}
        for result in rows.results
        if result["arm"] not in ANCHORS and job_of(result) in jobs
    ]
    return [*own, *more]


def version_changes(own: Sequence[Result], rows: Compact) -> list[str]:
    """The libraries whose versions differ, both of each."""
    return hash_changes(rows.judges.get("libraries", {}), own[0]["judges"].get("libraries", {}))


def write_against(folder: Path, own: Sequence[Result], rows: Compact) -> str:
    """Write ``against.md`` and ``against.json``: the scores beside those of the file, and the comparisons.

    Where an anchor is not that of the file, there are no comparisons: the text says which and by how much.

    Args:
        folder: the benchmark's.
        own: its results.
        rows: the file's.

    Returns:
        The text.
    """
    anchors = anchors_against(own, rows)
    others = foreign(anchors)
    compared = [] if others else compared_with(own, rows)
    metric, everything = primary(summarize(list(own))), summarize(beside(own, rows))
    same = ", ".join(f"{each.arm} {each.largest:.1g}" for each in anchors if each.largest is not None)
    told = [f"Largest difference of a picture's score from the file's anchors: {same or 'they share none'}."]
    told += [
        f"Other versions: {change}. Small differences may come from that." for change in version_changes(own, rows)
    ]
    parts = [f"Beside {rows.name}.json, on the same subjects and seeds\n", scores_table(everything)]
    if others:
        told.append(
            f"NOT COMPARED: {', '.join(others)} should be equal to the file's within {ANCHOR_TOLERANCE:g}. "
            "Something else than the methods differs: the base, the judges, the world, or the libraries."
        )
    elif compared:
        heads = ["method", "minus", f"difference in {metric.title}, 95 % interval", "p (Holm)", "subjects", ""]
        cells = [[each.arm, each.rival, *comparison_cells(each)] for each in compared]
        parts.append(markdown_table(heads, cells, (0, 1)))
        told.append(f"Comparisons that p is corrected for: {len(compared)}.")
    several = {r["arm"] for r in own if r["arm"] not in ANCHORS} - methods_in(own).keys()
    if several:
        told.append(f"Not compared, since their best rate would be chosen from these results: {', '.join(several)}.")
    text = "\n".join([*parts, "\n".join([*caption(everything, []), *told]), ""])
    write_text(folder / TEXT, text)
    content = {"file": rows.name, "primary": metric.key, "anchors": [asdict(each) for each in anchors]}
    write_text(folder / FOUND, json.dumps(content | {"comparisons": [asdict(c) for c in compared]}, indent=1))
    return text
