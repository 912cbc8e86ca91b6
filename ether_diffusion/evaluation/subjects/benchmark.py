"""The jobs of a benchmark: train, draw, score. What is done stays done; what fails is told and the rest goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from tqdm import tqdm

from ether_diffusion import pipelines
from ether_diffusion.bars import hidden
from ether_diffusion.evaluation.on_base import StudyOnBase
from ether_diffusion.evaluation.runner import (
    Job,
    check_study_inputs,
    hash_changes,
    remove_training,
    run_study,
    train,
)
from ether_diffusion.evaluation.subjects.against import (
    anchors_against,
    beside,
    check_named,
    check_same,
    foreign,
    read_rows,
    write_against,
)
from ether_diffusion.evaluation.subjects.arms import (
    ANSWERS,
    all_jobs,
    asked_of,
    is_anchor,
    method_of,
    settings_hash,
    strengths_of,
    training_of,
    truths_of,
)
from ether_diffusion.evaluation.subjects.compact import CONFIG, JOBS, Compact, Protocol, protocol_of
from ether_diffusion.evaluation.subjects.planned import FILES, write_planned
from ether_diffusion.evaluation.subjects.protocols import Subject, load_protocol
from ether_diffusion.evaluation.subjects.settings import BASE, BenchmarkConfig, named_in
from ether_diffusion.evaluation.subjects.summary import (
    Result,
    primary,
    read_result,
    read_results,
    summarize,
)
from ether_diffusion.evaluation.tables import write_summary
from ether_diffusion.families.registry import family_of
from ether_diffusion.files import atomic_path, write_text
from ether_diffusion.images import list_images
from ether_diffusion.metrics.distances import components, mean_distances
from ether_diffusion.metrics.judges import load_judges
from ether_diffusion.metrics.scoring import Judges, References, score_class_images, score_drift, score_images
from ether_diffusion.pipelines.file import first_line
from ether_diffusion.reading import read_json
from ether_diffusion.runs.drawing import Asked, draw, load_run, own_guidance, set_strength
from ether_diffusion.runs.folder import git_revision
from ether_diffusion.runs.record import read_run
from ether_diffusion.training import dreambooth
from ether_diffusion.training.loop import TrainingDivergedError
from ether_diffusion.training.sections import AdapterSection
from ether_diffusion.training.trainables import check_peft_config

SCORES_VERSION = 2
"""Raised when the scores of an image change, so that images that were scored before are scored again."""


@dataclass
class Bench(StudyOnBase[Subject]):
    """Where the jobs of a benchmark are done.

    Attributes:
        config: the benchmark's settings.
        subjects: what is learnt.
        judges: who scores.
        device: where to draw.
        rows: of another benchmark, to compare with.
    """

    config: BenchmarkConfig
    subjects: list[Subject]
    judges: Judges
    device: torch.device
    rows: Compact | None = None
    _seen: dict[str, References] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.config.guidance_scale is None:
            self.config = replace(self.config, guidance_scale=own_guidance(self.config.base))

    @property
    def output_dir(self) -> Path:
        """Where runs, images and results go."""
        return self.config.output_dir

    @classmethod
    def load(cls, config: BenchmarkConfig, device: torch.device) -> Bench:
        """Look for the subjects and load the judges.

        Raises:
            ImportError, OSError, ValueError: a subject or a judge is missing, a setting is impossible, or the rows to
                compare with are of other jobs.
        """
        check_study_inputs(config.output_dir, {"data_dir": config.data_dir})
        rows = None if config.against is None else read_rows(config.against)
        subjects = load_protocol(config.protocol, config.data_dir, config.output_dir / "subjects", config.subjects)
        if rows is not None:
            names = [subject.name for subject in subjects]
            check_named(rows, {**config.planned, **config.secondary}, names, config.seeds)
        for job in all_jobs(config, subjects):
            if not is_anchor(job):
                # a mistake in the last arm shows before the first one runs
                check_peft_config(training_of(job, config, config.output_dir).section(AdapterSection))
        judges = load_judges(config.dino, config.clip, config.lpips, config.lpips_net, config.lpips_size, device)
        bench = cls(config, subjects, judges, device, rows)
        if rows is not None:
            arms = {arm: config.settings_of(arm) for arm in config.arms}
            check_same(rows, bench.protocol(), arms, config.seeds)
        return bench

    def jobs(self) -> list[Job[Subject]]:
        """Every job, subject by subject, the anchors first."""
        return all_jobs(self.config, self.subjects)

    def write_outline(self, jobs: Sequence[Job[Subject]]) -> None:
        """Write the keys of all jobs, and the settings."""
        write_text(self.output_dir / JOBS, json.dumps([job.key for job in jobs], indent=1))
        settings = json.loads(json.dumps(asdict(self.config), default=str))
        del settings["shard"]  # what every shard writes is the same
        write_text(self.output_dir / CONFIG, yaml.safe_dump(settings))

    def summarize(self, jobs: Sequence[Job[Subject]]) -> tuple[str, list[str]]:
        """Write tables of what is done, also beside the rows of another benchmark; of all, the planned comparisons."""
        text, missing = write_summary(self.output_dir, jobs)
        done = read_results(self.output_dir, jobs)[0]
        if self.rows is not None and done:
            text += "\n" + write_against(self.output_dir, done, self.rows)
        if (self.config.planned or self.config.secondary) and not missing:
            text += "\n" + self._compare(done)
        return text, missing

    def _compare(self, done: list[Result]) -> str:
        """The planned comparisons; none where one names an arm of other rows and an anchor is not that of theirs."""
        both = (self.config.planned, self.config.secondary)
        metric = primary(summarize(self.compared(done)))
        if self.rows is None:
            return write_planned(self.output_dir, self.compared(done), *both, metric)
        named = any(named_in(sides, self.rows.name) for each in both for sides in each.values())
        if named and (others := foreign(anchors_against(done, self.rows))):
            for name in FILES:
                (self.output_dir / name).unlink(missing_ok=True)
            return f"The planned comparisons are not made: {', '.join(others)} is not that of {self.rows.name}.json.\n"
        return write_planned(self.output_dir, self.compared(beside(done, self.rows)), *both, metric)

    def compared(self, results: list[Result]) -> list[Result]:
        """What planned comparisons are of: everything."""
        return results

    def protocol(self) -> Protocol:
        """What its jobs share, before one of them has run."""
        asked_for = []
        for subject in self.subjects:
            job = Job(BASE, {}, subject, self.config.seeds[0])
            rows = {kind: [{"prompt": p} for p in each.prompts] for kind, each in asked_of(job, self.config).items()}
            references = [str(path) for path in list_images(subject.references)]
            facts = {"arm": BASE, "subject": subject.name, "references": references, "judged_by": self._judged_by(job)}
            asked_for.append(facts | self._identity(job) | rows)
        found = protocol_of(asked_for, asdict(self.config))
        assert found is not None, "there is a subject"
        return found

    def run_job(self, job: Job[Subject]) -> None:
        """Train, draw and score one subject, each unless it is there; the scores are written last.

        Images that other judges scored are scored anew. A training that diverged is a result, too: without images.

        Raises:
            ValueError: scores or images are there that were made with other settings or from another base.
        """
        result, run = self._path("results", job, ".json"), self._path("runs", job)
        if result.is_file():
            known = read_result(result)
            self._check(known, result, job)
            if known.get("diverged") or known["judged_by"] == self._judged_by(job):
                return
        facts = {
            "arm": job.arm,
            "learning_rate": job.settings.get("learning_rate"),
            "subject": job.subject.name,
            "seed": job.seed,
            "settings": {name: value for name, value in job.settings.items() if value is not None},
            "judges": self.judges.identity,
            "judged_by": self._judged_by(job),
            "git_revision": git_revision(),
            **self.drawn_as(job),
        }
        try:
            images = self._images(job)
        except TrainingDivergedError as error:
            facts |= self._identity(job) | {"diverged": first_line(error), "images": []}
        else:
            facts |= read_json(images / "facts.json", dict) | self._score(job, images)
        write_text(result, json.dumps(facts, default=str))
        if not self.config.keep_runs and run.exists():
            remove_training(run)

    def drawn_as(self, job: Job[Subject]) -> dict[str, str]:
        """What its result says of how its training is drawn: nothing, for it is drawn as it ended."""
        return {}

    def _judged_by(self, job: Job[Subject]) -> dict[str, Any]:
        """What the scores of its images depend on: judges, truths, and the set of scores that there is."""
        return {**self.judges.weights, "truths": job.subject.truths_fingerprint, "scores": SCORES_VERSION}

    def _references(self, job: Job[Subject]) -> References:
        """The subject's references, seen by the judges once and not by each of its jobs."""
        if job.subject.name not in self._seen:
            references = list_images(job.subject.references)
            self._seen = {job.subject.name: References(references, self.judges, truths_of(job, self.config))}
        return self._seen[job.subject.name]

    def _path(self, kind: str, job: Job[Subject], suffix: str = "") -> Path:
        return self.config.output_dir / kind / f"{job.key}{suffix}"

    def _identity(self, job: Job[Subject]) -> dict[str, Any]:
        hashes = self.base_hashes
        own = hashes[family_of(self.base).DENOISER]
        return {"settings_hash": settings_hash(job, self.config), "base_hash": own, "base_hashes": hashes}

    def _images(self, job: Job[Subject]) -> Path:
        """The folder of the job's images, drawn with what it trains if it is not there; whole or not at all."""
        folder = self._path("images", job)
        if folder.is_dir():
            self._check(read_json(folder / "facts.json", dict), folder / "facts.json", job)
            return folder
        facts = self._identity(job)
        pipe = self.base
        if not is_anchor(job):
            pipe, learnt = self.learnt(job)
            facts |= learnt
        with atomic_path(folder) as temporary:
            strengths = strengths_of(job, self.config)
            for name, asked in asked_of(job, self.config).items():
                if name in strengths:
                    set_strength(pipe, strengths[name])
                (temporary / name).mkdir(parents=True)
                self._draw(pipe, asked, temporary / name, job)
            write_text(temporary / "facts.json", json.dumps(facts))
        return folder

    def learnt(self, job: Job[Subject]) -> tuple[DiffusionPipeline, dict[str, Any]]:
        """Train, unless it is done: a pipeline with what was learnt, and the facts about it for the result."""
        run, identity = self._path("runs", job), self._identity(job)
        mark = f"{identity['settings_hash']} {identity['base_hashes']}"
        known = train(training_of(job, self.config, run), dreambooth.run, mark)
        facts = {name: known[name] for name in ("trained_parameters", "seconds")}
        facts["bytes"] = read_run(run).result_bytes
        pipe, method = load_run(run, self.device), method_of(job)
        facts["distances"] = mean_distances(components(pipe), components(self.base), method.name)
        if method.is_own:
            pipelines.fuse(pipe)  # to draw as fast as the base does
        return pipe, facts

    def _draw(self, pipe: DiffusionPipeline, asked: Asked, folder: Path, job: Job[Subject]) -> None:
        config = self.config
        if job.arm in ANSWERS:
            drawn = ANSWERS[job.arm](asked, job.subject)
        else:
            assert config.guidance_scale is not None, "it is the base's own where none was given"
            drawn = draw(
                pipe, asked, config.batch_size, config.num_inference_steps, config.guidance_scale, config.encoding
            )
        bar = tqdm(drawn, total=len(asked.names), desc="draw", leave=False, disable=hidden())
        for name, picture in zip(asked.names, bar, strict=True):
            picture.save(folder / name)

    def _score(self, job: Job[Subject], images: Path) -> dict[str, Any]:
        """What the judges say, by kind of image: rows with the file and the prompt of each."""
        asked, strengths = asked_of(job, self.config), strengths_of(job, self.config)
        paths = {kind: [images / kind / name for name in each.names] for kind, each in asked.items()}
        references = self._references(job)
        scored = score_images(paths["images"], asked["images"].prompts, references, self.judges, self.config.token)
        rows = {"images": scored.images}
        if paths["class_images"]:
            rows["class_images"] = score_class_images(paths["class_images"], references, self.judges)
        at = {f"{s:g}": self._score_at(kind, asked, paths, references) for kind, s in strengths.items()}
        if paths["unrelated"]:
            before = self._images(replace(job, arm=BASE, settings={}, rate=None)) / "unrelated"
            base = [before / name for name in asked["unrelated"].names]
            rows["unrelated"] = score_drift(paths["unrelated"], base, self.judges)
        return {
            "folder": str((images / "images").relative_to(self.config.output_dir)),
            "references": [str(path) for path in references.paths],
            "real": references.among(self.judges),
            "prompts": scored.prompts,
            **{
                kind: [
                    {"file": name, "prompt": prompt} | row
                    for name, prompt, row in zip(each.names, each.prompts, rows.get(kind, []), strict=True)
                ]
                for kind, each in asked.items()
                if kind not in strengths
            },
            **({"at": at} if at else {}),
        }

    def _score_at(
        self, kind: str, asked: Mapping[str, Asked], paths: Mapping[str, list[Path]], references: References
    ) -> list[dict[str, Any]]:
        """The rows of images at another strength, with the file of each in the job's folder."""
        scored = score_images(paths[kind], asked[kind].prompts, references, self.judges, self.config.token)
        return [{"file": f"../{kind}/{path.name}"} | row for path, row in zip(paths[kind], scored.images, strict=True)]

    def _check(self, known: Mapping[str, Any], path: Path, job: Job[Subject]) -> None:
        """Refuse what is there if it was made with other settings or photos, or from another base."""
        now, denoiser = self._identity(job), family_of(self.base).DENOISER
        changed = [] if known.get("settings_hash") == now["settings_hash"] else ["other settings or photos"]
        before = {**known.get("base_hashes", {}), denoiser: known.get("base_hash")}  # 0.1 recorded the denoiser's alone
        changed += [f"another base ({told})" for told in hash_changes(before, now["base_hashes"])]
        if changed:
            raise ValueError(f"{path} was made with {' and '.join(changed)}: remove it, or choose another output_dir")


def run_benchmark(config: BenchmarkConfig) -> bool:
    """Do this process's share of the jobs, write the summary of all that are done, and print it.

    Returns:
        Whether all jobs of all processes have a result; in one of several processes they may not yet.

    Raises:
        SystemExit: a setting is impossible, a judge is missing, a signal came, or, in a single process, jobs failed.
    """
    return run_study(lambda device: Bench.load(config, device), config.shard)
