"""Run rows of a committed table again, and say whether they agree with it, picture by picture.

The settings come from the file.

A training amplifies rounding: another number of threads, another processor or another version of a library can send it
on another course, while anything that is really different (a rate, a base, a judge) moves every picture of every
training. So a row agrees if every picture of its trainings is within the tolerance, *agrees but for some trainings* if
that holds for at least half of the trainings, and does not agree otherwise. Anchors train nothing: all of their
pictures must agree, within a smaller tolerance.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ether_diffusion.config import suggestion
from ether_diffusion.evaluation.runner import run_study
from ether_diffusion.evaluation.settings import ENCODING
from ether_diffusion.evaluation.subjects.against import (
    ANCHOR_TOLERANCE,
    TOLERANCE,
    check_same,
    job_of,
    sample_differences,
)
from ether_diffusion.evaluation.subjects.benchmark import Bench
from ether_diffusion.evaluation.subjects.compact import WAY, Compact, arm_key
from ether_diffusion.evaluation.subjects.settings import ANCHORS, BenchmarkConfig
from ether_diffusion.evaluation.subjects.summary import Metric, Result, all_results, primary, summarize, unit_values
from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table, number

AGREES, MOSTLY, DIFFERS = "agrees", "agrees but for some trainings", "DOES NOT AGREE"
TEXT, FOUND = "reproduced.md", "reproduced.json"
"""Files in the output folder."""


@dataclass(frozen=True)
class JobAgreement:
    """One job beside that of the file.

    Attributes:
        subject: what was learnt.
        seed: of the training.
        within: how many pictures have all scores within the tolerance of trainings or anchors.
        pictures: how many there are; 0 where the training diverged.
        largest: the largest difference of a score of a picture; None where one of the two diverged.
        agrees: whether all are within, or both diverged.
    """

    subject: str
    seed: int
    within: int
    pictures: int
    largest: float | None
    agrees: bool


@dataclass(frozen=True)
class RowAgreement:
    """A row of the table beside the same jobs, run again.

    Attributes:
        arm: its name, with its learning rate.
        there: the mean over subjects of the score that decides, in the file, of these jobs; None without pictures.
        here: the same of the new results.
        jobs: each of them.
        verdict: one of :data:`AGREES`, :data:`MOSTLY`, :data:`DIFFERS`.
    """

    arm: str
    there: float | None
    here: float | None
    jobs: list[JobAgreement]
    verdict: str


def job_agreement(ours: Result, theirs: Result) -> JobAgreement:
    """Hold a result against that of the same job in the file."""
    diverged = [bool(result.get("diverged")) for result in (ours, theirs)]
    if any(diverged):
        return JobAgreement(*job_of(ours), 0, 0, None, all(diverged))
    each = sample_differences(ours, theirs)
    tolerance = ANCHOR_TOLERANCE if ours["arm"] in ANCHORS else TOLERANCE
    within = sum(difference <= tolerance for difference in each)
    return JobAgreement(*job_of(ours), within, len(each), max(each, default=0.0), within == len(each))


def agreements(own: Sequence[Result], rows: Compact) -> list[RowAgreement]:
    """Every row that ran again beside that of the file, in the order of the results."""
    known = {(arm_key(result), *job_of(result)): result for result in rows.results}
    metric, found = primary(summarize(list(own))), []
    for arm in dict.fromkeys(arm_key(result) for result in own):
        pairs = [
            (result, known[key])
            for result in own
            if arm_key(result) == arm and (key := (arm, *job_of(result))) in known
        ]
        jobs = [job_agreement(*pair) for pair in pairs]
        there, here = (_mean([pair[side] for pair in pairs], metric) for side in (1, 0))
        found.append(RowAgreement(arm, there, here, jobs, _verdict(jobs, arm in ANCHORS)))
    return found


def _mean(results: list[Result], metric: Metric) -> float | None:
    values = unit_values(results, metric).values()
    return sum(values) / len(values) if values else None


def _verdict(jobs: Sequence[JobAgreement], is_anchor: bool) -> str:
    agreed = sum(job.agrees for job in jobs)
    if agreed == len(jobs) > 0:
        return AGREES
    return MOSTLY if not is_anchor and 2 * agreed >= len(jobs) > 0 else DIFFERS


def agreement_text(found: Sequence[RowAgreement], metric: Metric, name: str) -> str:
    """A table of the rows, and below it the jobs that do not agree."""
    lines = [
        [
            row.arm,
            f"{sum(job.agrees for job in row.jobs)} of {len(row.jobs)}",
            f"{sum(job.within for job in row.jobs)} of {sum(job.pictures for job in row.jobs)}",
            number(max((job.largest for job in row.jobs if job.largest is not None), default=None), ".1g"),
            number(row.there),
            number(row.here),
            row.verdict,
        ]
        for row in found
    ]
    heads = ["row", "jobs that agree", "pictures within", "largest difference"]
    heads += [f"{metric.title} there", "here", ""]
    told = [
        f"{row.arm}, {job.subject}, seed {job.seed}: "
        + ("one of the two diverged" if job.largest is None else f"{job.within} of {job.pictures} pictures agree")
        for row in found
        for job in row.jobs
        if not job.agrees
    ]
    within = (
        f"Within: all scores of a picture differ by at most {TOLERANCE:g}, those of anchors by {ANCHOR_TOLERANCE:g}.\n"
    )
    parts = [f"Beside {name}.json\n", markdown_table(heads, lines, (0, 6)), within]
    return "\n".join([*parts, *([f"Not within: {'; '.join(told)}.\n"] if told else [])])


@dataclass(frozen=True)
class Again:
    """Which rows of a file run again, and what stands in place of what the file names.

    Attributes:
        output_dir: where to run.
        arms: the names of the methods; the anchors always run. All where none is named.
        subjects: all of the file's where none is named.
        seeds: likewise.
        protocol: the file of subjects, where the table's protocol was one.
        data_dir: photos of the protocol dreambooth.
        base: where the base lies, if its name in the table is not where it is here.
        dino: likewise the judge of DINO.
        clip: likewise that of CLIP-I and CLIP-T.
        lpips: the weights of LPIPS' trunk.
    """

    output_dir: Path
    arms: Sequence[str] = ()
    subjects: Sequence[str] = ()
    seeds: Sequence[int] = ()
    protocol: str | None = None
    data_dir: Path | None = None
    base: str | None = None
    dino: str | None = None
    clip: str | None = None
    lpips: str | None = None


def config_of(rows: Compact, again: Again) -> BenchmarkConfig:
    """The benchmark that runs rows of the file again.

    Raises:
        ValueError: the file has no such arm, does not say an arm's settings, or the arm draws another arm's training.
    """
    protocol = rows.protocol
    assert protocol is not None, "read_rows refuses files without it"
    _check_not_derived(rows, again.arms)
    known: dict[str, dict[str, Any]] = {}
    for result in rows.results:
        arm = result["arm"]
        if arm in ANCHORS:
            continue
        if "settings" not in result:
            raise ValueError(f"{rows.name}.json does not say the settings of {arm}: write it anew from its folder")
        entry = known.setdefault(arm, {**result["settings"], "learning_rate": []})
        if (rate := result["learning_rate"]) is not None and rate not in entry["learning_rate"]:
            entry["learning_rate"].append(rate)
    for arm in again.arms:
        if arm not in (*known, *ANCHORS):
            raise ValueError(f"{rows.name}.json has no arm {arm}{suggestion(arm, known)}; it has {', '.join(known)}")
    chosen = {arm: settings for arm, settings in known.items() if not again.arms or arm in again.arms}
    training = {key: value for key, value in protocol["base"].items() if value is not None}
    training |= {"pretrained_model_name_or_path": again.base} if again.base else {}
    training |= {key: protocol["training"][key] for key in ENCODING if key in protocol["training"]}  # the base's, too
    asked: dict[str, Any] = dict(protocol["asked"])
    return BenchmarkConfig(
        output_dir=again.output_dir,
        protocol=again.protocol or protocol["name"],
        data_dir=again.data_dir,
        subjects=list(again.subjects) or list(protocol["subjects"]),
        arms={arm: _own(settings, training) for arm, settings in chosen.items()},
        training=training,
        seeds=list(again.seeds) or sorted({result["seed"] for result in rows.results}),
        dino=again.dino or rows.judges["dino"]["model"],
        clip=again.clip or rows.judges["clip"]["model"],
        lpips=again.lpips,
        **asked,
    )


def _own(settings: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an arm that are not those of all, without an empty list of rates."""
    return {key: value for key, value in settings.items() if value != [] and (key, value) not in training.items()}


def _check_not_derived(rows: Compact, arms: Sequence[str]) -> None:
    """Refuse arms that are no trainings of their own.

    Raises:
        ValueError: one of ``arms``, or where none is named one of the file, draws the training of another.
    """
    derived = {result["arm"] for result in rows.results if WAY in result}
    if wanted := sorted(derived & set(arms) if arms else derived):
        others = [each for each in dict.fromkeys(r["arm"] for r in rows.results) if each not in (*ANCHORS, *derived)]
        raise ValueError(
            f"{rows.name}.json has {'; '.join(wanted)}, made of another arm's training, which only the study's own "
            f"program does: run that, or name arms that are trained, --arms {' '.join(map(shlex.quote, others))}"
        )


def reproduce(config: BenchmarkConfig, rows: Compact) -> list[RowAgreement]:
    """Run the benchmark, unless its jobs are done, hold it against the file, write what is found and print it.

    Returns:
        The rows; none where other processes have jobs left.

    Raises:
        SystemExit: a setting is impossible, the jobs are not those of the file, or jobs failed.
    """

    def checked(device: torch.device) -> Bench:
        bench = Bench.load(config, device)
        check_same(rows, bench.protocol(), {arm: config.settings_of(arm) for arm in config.arms}, config.seeds)
        return bench

    if not run_study(checked):
        print("other processes have jobs left; the last one to finish says what agrees")
        return []
    wanted = {(subject, seed) for subject in config.subjects for seed in config.seeds}
    own = [r for r in all_results(config.output_dir) if job_of(r) in wanted and r["arm"] in (*ANCHORS, *config.arms)]
    found, metric = agreements(own, rows), primary(summarize(own))
    text = agreement_text(found, metric, rows.name)
    write_text(config.output_dir / TEXT, text)
    tolerances = {"tolerance": TOLERANCE, "anchor_tolerance": ANCHOR_TOLERANCE}
    content = {"file": rows.name, **tolerances, "rows": [asdict(row) for row in found]}
    write_text(config.output_dir / FOUND, json.dumps(content, indent=1))
    print(text)
    return found
