"""A whole benchmark at its smallest: every method, killed and resumed, with a job that fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import before_file_calls, die
from PIL import Image
from torch import Tensor

from ether_diffusion import registry
from ether_diffusion.evaluation import runner
from ether_diffusion.evaluation.runner import Job
from ether_diffusion.evaluation.subjects import benchmark
from ether_diffusion.evaluation.subjects.arms import all_jobs, is_anchor, method_of, training_of
from ether_diffusion.evaluation.subjects.benchmark import Bench
from ether_diffusion.evaluation.subjects.protocols import Subject
from ether_diffusion.evaluation.subjects.settings import BASE, COPIES, NOISE, BenchmarkConfig
from ether_diffusion.evaluation.subjects.summary import all_results
from ether_diffusion.evaluation.tables import write_summary
from ether_diffusion.families.sd import StableDiffusion
from ether_diffusion.metrics.backbones import Picture, as_rgb
from ether_diffusion.metrics.scoring import Judges
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.private import forget_accelerator
from ether_diffusion.reading import DamagedFileError
from ether_diffusion.runs.drawing import Asked, draw, load_pipeline, load_run
from ether_diffusion.training import dreambooth, loop
from ether_diffusion.training.loop import TrainingInterruptedError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerator()


class Colours:
    """A judge to whom an image is its mean colour and a text its length; it counts what it looks at."""

    identity: ClassVar = {"model": "colours"}

    def __init__(self) -> None:
        self.looks = 0

    def image_features(self, images: list[Picture], show: str | None = None) -> Tensor:
        self.looks += len(images)
        means = torch.tensor(np.array([np.asarray(as_rgb(image), np.float32).mean((0, 1)) for image in images]))
        return torch.nn.functional.normalize(means, dim=-1)

    def text_features(self, prompts: list[str]) -> Tensor:
        return torch.nn.functional.normalize(torch.tensor([[len(p), 1.0, 2.0] for p in prompts]), dim=-1)


def judges() -> Any:
    return Judges(Colours(), Colours())  # type: ignore[arg-type]


def jobs_of(config: BenchmarkConfig, subjects: list[Subject]) -> list[Job[Subject]]:
    """The jobs for which a model draws: the base and what is trained."""
    return [job for job in all_jobs(config, subjects) if not is_anchor(job) or job.arm == BASE]


def run_jobs(jobs: list[Job[Subject]], config: BenchmarkConfig, judges: Judges) -> dict[str, str]:
    return runner.run_jobs(Bench(config, [job.subject for job in jobs], judges, CPU), jobs)


@pytest.fixture
def dog(tmp_path: Path) -> Subject:
    folder = tmp_path / "photos"
    folder.mkdir()
    for shade in (40, 200):
        Image.new("RGB", (32, 32), (shade, 90, 60)).save(folder / f"{shade}.png")
    return Subject("dog", "dog", folder, ("a {token} dog", "a {token} dog in snow"), ("a red cat",))


@pytest.fixture
def config(tmp_path: Path, base_folder: Path) -> BenchmarkConfig:
    return BenchmarkConfig(
        output_dir=tmp_path / "bench",
        arms={"ether": {"method": "ether", "learning_rate": [0.1, 0.2]}},
        training={"pretrained_model_name_or_path": str(base_folder), "max_train_steps": 2, "resolution": 32},
        images_per_prompt=2,
        num_inference_steps=2,
        batch_size=3,
    )


def rows_of(config: BenchmarkConfig, job: Job[Subject]) -> dict[str, Any]:
    return json.loads((config.output_dir / "results" / f"{job.key}.json").read_text())


def test_every_rate_is_an_arm_beside_the_base(config: BenchmarkConfig, dog: Subject) -> None:
    config.seeds = [0, 5]
    keys = [job.key for job in jobs_of(config, [dog])]
    assert keys == [f"{arm}/dog/seed-{seed}" for seed in (0, 5) for arm in ("base", "ether@0.1", "ether@0.2")]
    training = training_of(jobs_of(config, [dog])[2], config, Path("run"))
    assert (training.method, training.learning_rate, training.seed) == ("ether", 0.2, 0)
    assert training.instance_prompt == "a photo of qwe dog"
    assert training.max_train_steps == 2


def test_arms_take_what_they_do_not_name_from_the_shared_settings(config: BenchmarkConfig, dog: Subject) -> None:
    config.training |= {"method": "naive", "learning_rate": "6e-2"}  # so YAML reads 6e-2
    config.arms = {"1": {"n_blocks": 1}, "2": {"method": "lora", "learning_rate": ["1e-3", 1e-2]}}
    base, one, *two = jobs_of(config, [dog])
    assert (method_of(base).name, base.settings) == ("ether_plus", {})
    assert (one.key, method_of(one).name, training_of(one, config, Path("x")).learning_rate) == (
        *("1/dog/seed-0", "naive"),
        0.06,
    )
    assert [job.key for job in two] == ["2@0.001/dog/seed-0", "2@0.01/dog/seed-0"]
    assert [training_of(job, config, Path("x")).learning_rate for job in two] == [1e-3, 1e-2]
    config.arms = {"1": {"learning_rate": "fast"}}
    with pytest.raises(ValueError, match="arm 1: the learning rate 'fast' is no number"):
        jobs_of(config, [dog])


def test_what_the_benchmark_sets_itself_is_refused() -> None:
    base = {"pretrained_model_name_or_path": "x"}
    with pytest.raises(ValueError, match="training: seed, instance_prompt is set by the benchmark") as told:
        BenchmarkConfig(Path("x"), training={**base, "seed": 5, "instance_prompt": "a dog"})
    assert "leave it out" in str(told.value)
    with pytest.raises(ValueError, match="a: quiet, log_level is set by the benchmark"):
        BenchmarkConfig(Path("x"), training=base, arms={"a": {"quiet": True, "log_level": "info"}})
    with pytest.raises(ValueError, match="a list of learning rates belongs to an arm"):
        BenchmarkConfig(Path("x"), training={**base, "learning_rate": [1e-3]})


def test_base_and_arms_are_drawn_with_the_chunks_of_the_training(
    config: BenchmarkConfig, dog: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: set[int] = set()
    original = StableDiffusion.drawing

    def drawing(family: Any, *arguments: Any) -> Any:
        found = original(family, *arguments)
        lengths.add(found["prompt_embeds"].shape[1])
        return found

    monkeypatch.setattr(StableDiffusion, "drawing", drawing)
    config.training |= {"prompt_chunks": 2, "num_validation_images": 0}
    jobs = jobs_of(config, [dog])[:2]
    assert run_jobs(jobs, config, judges()) == {}
    assert lengths == {2 * 77}


def test_a_new_token_is_the_one_in_the_prompts(config: BenchmarkConfig, dog: Subject) -> None:
    arms = {"new": {"placeholder_token": "<dog>", "num_vectors": 2, "token_lr": 0.5, "learning_rate": 0.1}}
    with pytest.raises(ValueError, match=r"arm new learns the placeholder_token <dog>, and the prompts .* token qwe"):
        replace(config, arms=arms)
    config = replace(config, arms=arms, token="<dog>", strengths=[0.5])
    base, job = jobs_of(config, [dog])
    assert run_jobs([base, job], config, judges()) == {}
    found, of_base = rows_of(config, job), rows_of(config, base)
    assert found["trained_parameters"]["tokens.text_encoder"] == 2 * 32
    assert [row["prompt"] for row in found["images"]] == [row["prompt"] for row in of_base["images"]]
    assert "a <dog> dog in snow" in {row["prompt"] for row in found["images"]}
    assert list(found["at"]) == ["0.5"]


def test_comparisons_without_a_test_are_made_without_planned_ones_too(config: BenchmarkConfig, dog: Subject) -> None:
    config.secondary = {"faster minus slower": [["ether@0.2"], ["ether@0.1"]]}
    jobs = jobs_of(config, [dog])
    assert run_jobs(jobs, config, judges()) == {}
    text, missing = Bench(config, [dog], judges(), CPU).summarize(jobs)
    assert missing == []
    assert "| faster minus slower | " in text
    assert (config.output_dir / "planned.md").read_text() in text


def test_class_images_are_shared_by_the_subjects_of_a_class(config: BenchmarkConfig, dog: Subject) -> None:
    job = jobs_of(config, [dog])[1]
    assert training_of(job, config, Path("x")).class_data_dir is None
    config.training |= {"with_prior_preservation": True}
    job = jobs_of(config, [replace(dog, class_word="stuffed animal")])[1]
    training = training_of(job, config, Path("x"))
    assert training.class_data_dir == config.output_dir / "class_images" / "stuffed-animal"
    assert training.class_prompt == "a photo of a stuffed animal"


def test_a_setting_that_does_not_exist_is_refused_with_its_arm(config: BenchmarkConfig, dog: Subject) -> None:
    config.arms = {"mine": {"metod": "ether"}}
    with pytest.raises(ValueError, match=r"arm mine: .*metod"):
        training_of(jobs_of(config, [dog])[1], config, Path("run"))
    with pytest.raises(ValueError, match="cannot be called base"):
        BenchmarkConfig(Path("x"), arms={"base": {}}, training={"pretrained_model_name_or_path": "x"})
    with pytest.raises(ValueError, match="needs pretrained_model"):
        BenchmarkConfig(Path("x"))


def test_images_are_scored_pair_by_pair_and_looked_at_once(config: BenchmarkConfig, dog: Subject) -> None:
    jobs, eyes = jobs_of(config, [dog]), judges()
    assert run_jobs(jobs, config, eyes) == {}
    assert eyes.clip.looks == 3 * 4 + 2  # the references once, not for every job
    assert eyes.dino.looks == 3 * (4 + 4 + 2 * 1) + 2  # and those of the class, and for unrelated prompts, twice
    record = rows_of(config, jobs[1])
    assert record["trained_parameters"] == {"unet": sum(record["trained_parameters"].values())}
    assert [row["prompt"] for row in record["images"]] == 2 * ["a qwe dog"] + 2 * ["a qwe dog in snow"]
    photos = Colours().image_features([Image.open(path).convert("RGB") for path in sorted(dog.references.iterdir())])
    for row in record["images"]:
        picture = Image.open(config.output_dir / "images" / jobs[1].key / "images" / row["file"])
        seen = Colours().image_features([picture])
        assert row["dino"] == pytest.approx(np.mean([float(seen[0] @ photo) for photo in photos]), abs=1e-6)
        assert row["dino_nearest"] == pytest.approx(max(float(seen[0] @ photo) for photo in photos), abs=1e-6)
        text = Colours().text_features([row["prompt"].replace("qwe ", "")])
        assert row["clip_t"] == pytest.approx(float(seen[0] @ text[0]), abs=1e-6)
    images = [
        np.asarray(Image.open(config.output_dir / "images" / job.key / "images" / "0000.png")).astype(int)
        for job in jobs
    ]
    assert all(np.abs(a - b).max() > 0 for a, b in ((images[0], images[1]), (images[1], images[2])))


def test_a_killed_benchmark_goes_on_where_it_was(
    config: BenchmarkConfig, dog: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(config, [dog])
    run_jobs(jobs, config, judges())
    whole = [rows_of(config, job)["images"] for job in jobs]

    config.output_dir = tmp_path / "killed"
    stages: list[tuple[Any, str]] = [(dreambooth, "run"), (Bench, "_draw"), (benchmark, "score_images")]
    for module, name in stages:
        with monkeypatch.context() as patch:

            def killed(*arguments: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                run_jobs(jobs[1:2], config, judges())
    run_jobs(jobs, config, judges())
    assert [rows_of(config, job)["images"] for job in jobs] == whole

    eyes = judges()
    run_jobs(jobs, config, eyes)
    assert eyes.dino.looks == 0


def test_five_kills_at_random_moments_do_not_change_the_summary(
    config: BenchmarkConfig, dog: Subject, tmp_path: Path
) -> None:
    """SIGKILL, as by a machine that goes down; each time the benchmark is started again."""
    jobs, forked = jobs_of(config, [dog]), multiprocessing.get_context("fork")
    config.training["max_train_steps"] = 5

    def benchmark_of(folder: Path) -> None:
        config.output_dir = folder
        run_jobs(jobs, config, judges())
        write_summary(folder, jobs)

    calls = 0

    def count(call: int) -> None:
        nonlocal calls
        calls = call

    with before_file_calls(count):
        benchmark_of(tmp_path / "whole")

    def killed_at(moment: int) -> None:
        with before_file_calls(lambda call: die() if call == moment else None):
            benchmark_of(tmp_path / "killed")

    moments, killed = random.Random(5), 0
    for _ in range(5):
        process = forked.Process(target=killed_at, args=(int(moments.uniform(0.1, 0.4) * calls),))
        process.start()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 2  # each dies before 0.4 of the whole is done
    benchmark_of(tmp_path / "killed")
    summaries = [(tmp_path / name / "summary.json").read_text() for name in ("whole", "killed")]
    assert summaries[0] == summaries[1]
    assert json.loads(summaries[0])["missing"] == []


def test_copies_and_noise_give_every_score_its_scale(config: BenchmarkConfig, dog: Subject) -> None:
    jobs = [job for job in all_jobs(config, [dog]) if job.arm in (BASE, COPIES, NOISE)]
    assert run_jobs(jobs, config, judges()) == {}
    base, copies, noise = (rows_of(config, job) for job in jobs)
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(dog.references.iterdir())]
    for kind, count in (("images", 4), ("class_images", 4), ("unrelated", 1)):
        folder = config.output_dir / "images" / "copies" / "dog" / "seed-0" / kind
        drawn = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
        assert len(drawn) == count
        assert all(np.array_equal(picture, photos[number % 2]) for number, picture in enumerate(drawn))
    assert all(row["dino_nearest"] == pytest.approx(1, abs=1e-6) for row in copies["images"])
    assert copies["unrelated"][0]["drift"] > 0
    assert base["unrelated"][0]["drift"] == pytest.approx(0, abs=1e-6)
    pixels = np.stack([np.asarray(Image.open(p)) for p in (config.output_dir / "images/noise").rglob("*.png")])
    assert pixels.shape[1:] == (32, 32, 3)
    assert abs(pixels.mean() - 127.5) < 2
    assert abs(pixels.std() - 73.9) < 1  # of a uniform byte
    assert "truth" not in {job.arm for job in all_jobs(config, [dog])}  # nobody knows it for photos
    assert "trained_parameters" not in noise


def test_the_truth_of_a_prompt_is_what_pictures_are_compared_with(config: BenchmarkConfig, dog: Subject) -> None:
    folder = dog.references.parent / "truths"
    folder.mkdir()
    paths = [folder / f"{index}.png" for index in range(8)]
    for index, path in enumerate(paths):
        Image.new("RGB", (32, 32), (30 * index, 255 - 30 * index, 99)).save(path)
    known = replace(dog, truths=(tuple(paths[:2]), tuple(paths[2:4])), answers=(tuple(paths[4:6]), tuple(paths[6:])))
    jobs = [job for job in all_jobs(config, [known]) if job.arm in (BASE, "truth")]
    assert run_jobs(jobs, config, judges()) == {}
    for job in jobs:
        record = rows_of(config, job)
        for number, row in enumerate(record["images"]):
            picture = Image.open(config.output_dir / "images" / job.key / "images" / row["file"])
            (seen,), truths = Colours().image_features([picture]), paths[:2] if number < 2 else paths[2:4]
            expected = float((Colours().image_features(truths) @ seen).mean())
            assert row["truth"] == pytest.approx(expected, abs=1e-6)
    truth = rows_of(config, jobs[1])
    assert truth["class_images"] == truth["unrelated"] == []
    drawn = sorted((config.output_dir / "images" / jobs[1].key / "images").iterdir())
    assert {np.asarray(Image.open(p)).tobytes() for p in drawn} <= {
        np.asarray(Image.open(p)).tobytes() for p in paths[4:]
    }
    other = replace(known, truths=known.truths[::-1])
    changed = [job for job in all_jobs(config, [other]) if job.arm == BASE]
    assert run_jobs(changed, config, judges()) == {}  # scored again, since the truths are others
    assert rows_of(config, changed[0])["judged_by"] != truth["judged_by"]


def test_a_job_that_fails_is_told_and_the_rest_goes_on(config: BenchmarkConfig, dog: Subject, tmp_path: Path) -> None:
    empty = Subject("cat", "cat", tmp_path / "empty", ("a {token} cat",))
    empty.references.mkdir()
    config.arms = {"ether": {"method": "ether"}}
    jobs = jobs_of(config, [empty, dog])
    failed = run_jobs(jobs, config, judges())
    assert set(failed) == {"base/cat/seed-0", "ether/cat/seed-0"}
    assert rows_of(config, jobs[3])["subject"] == "dog"
    assert (config.output_dir / "results" / "ether/cat/seed-0.error.txt").is_file()
    for shade in (1, 2):
        Image.new("RGB", (32, 32), (shade, 2, 3)).save(empty.references / f"{shade}.png")
    assert run_jobs(jobs, config, judges()) == {}
    assert not list((config.output_dir / "results").rglob("*.error.txt"))


def test_scores_of_other_settings_or_photos_are_not_mixed_in(config: BenchmarkConfig, dog: Subject) -> None:
    jobs = jobs_of(config, [dog])[:1]
    run_jobs(jobs, config, judges())
    Image.new("RGB", (32, 32), (1, 90, 60)).save(dog.references / "40.png")
    changed = jobs_of(config, [replace(dog)])[:1]
    assert "other settings or photos" in run_jobs(changed, config, judges())[jobs[0].key]
    config.guidance_scale = 3
    assert "other settings or photos" in run_jobs(jobs, config, judges())[jobs[0].key]


def test_other_judges_score_the_same_images_anew(config: BenchmarkConfig, dog: Subject) -> None:
    jobs = jobs_of(config, [dog])[:2]
    assert run_jobs(jobs, config, judges()) == {}
    before = [rows_of(config, job) for job in jobs]
    others = judges()
    others.dino.identity = {"model": "colours", "weights": "others"}
    assert run_jobs(jobs, config, others) == {}
    after = [rows_of(config, job) for job in jobs]
    assert [row["judged_by"]["dino"] for row in after] == [{"weights": "others"}] * 2
    assert [row["images"] for row in after] == [row["images"] for row in before]
    assert after[1]["seconds"] == before[1]["seconds"]  # not trained again
    assert others.clip.looks > 0


def test_results_from_another_base_are_not_mixed_in(config: BenchmarkConfig, dog: Subject) -> None:
    job = jobs_of(config, [dog])[0]
    assert run_jobs([job], config, judges()) == {}
    path = config.output_dir / "results" / f"{job.key}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_hash": "0123"}))
    told = run_jobs([job], config, judges())[job.key]
    assert "another base (unet 0123 → " in told


def test_another_text_encoder_is_another_base(
    config: BenchmarkConfig, dog: Subject, base_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    config.training["pretrained_model_name_or_path"] = str(tmp_path / "base")
    job = jobs_of(config, [dog])[0]
    assert run_jobs([job], config, judges()) == {}
    old = rows_of(config, job)
    tiny_pipeline(seed=1).text_encoder.save_pretrained(tmp_path / "base" / "text_encoder")
    told = run_jobs([job], config, judges())[job.key]
    assert f"another base (text_encoder {old['base_hashes']['text_encoder']} → " in told
    path = config.output_dir / "results" / f"{job.key}.json"
    del old["base_hashes"]  # as 0.1 wrote it
    path.write_text(json.dumps(old))
    assert run_jobs([job], config, judges()) == {}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is damaged"),
        ("[]", "expected settings and facts by name"),
        ('{"arm": 5}', "its arm is 5"),
        ('{"arm": "base"}', "it has no learning_rate"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_result_is_named(content: str, reason: str, config: BenchmarkConfig, dog: Subject) -> None:
    job = jobs_of(config, [dog])[0]
    path = config.output_dir / "results" / f"{job.key}.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    told = run_jobs([job], config, judges())[job.key]
    assert told.startswith(f"DamagedFileError: {path} is damaged")
    assert reason in told
    with pytest.raises(DamagedFileError, match=re.escape(str(path))):
        all_results(config.output_dir)


def test_a_base_belongs_to_all_arms() -> None:
    with pytest.raises(ValueError, match="arm mine: revision names a base; all arms share that of training"):
        BenchmarkConfig(
            Path("x"), arms={"mine": {"revision": "v1"}}, training={"pretrained_model_name_or_path": "owner/base"}
        )


@pytest.mark.parametrize("shards", [2, 3])
def test_independent_shards_give_the_folder_of_one_run(
    shards: int, config: BenchmarkConfig, dog: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(own: BenchmarkConfig, device: torch.device) -> Bench:
        return Bench(own, [dog], judges(), CPU)

    monkeypatch.setattr(Bench, "load", load)
    assert benchmark.run_benchmark(config)
    split = tmp_path / "split"
    finished = []
    for shard in range(shards, 0, -1):  # in any order, from nothing but the same command
        finished.append(benchmark.run_benchmark(replace(config, output_dir=split, shard=f"{shard}/{shards}")))
    assert finished == [False] * (shards - 1) + [True]

    def content(folder: Path) -> dict[str, Any]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): comparable(path) for path in files}

    def comparable(path: Path) -> Any:
        if path.suffix != ".json":
            return path.read_bytes().replace(str(split).encode(), str(config.output_dir).encode())
        value = json.loads(path.read_text())
        return {key: each for key, each in value.items() if key != "seconds"} if isinstance(value, dict) else value

    one, union = content(config.output_dir), content(split)
    assert union.keys() == one.keys()
    assert [name for name in one if one[name] != union[name]] == []


def test_a_signal_ends_the_benchmark_and_the_training_goes_on_from_its_checkpoint(
    config: BenchmarkConfig, dog: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.training |= {"max_train_steps": 6}
    jobs = jobs_of(config, [dog])[1:2]
    assert run_jobs(jobs, config, judges()) == {}
    whole = rows_of(config, jobs[0])["images"]

    config.output_dir = tmp_path / "stopped"
    steps: list[int] = []
    log = loop._Run.log

    def log_and_stop(run: Any, step: int, *rest: Any) -> None:
        log(run, step, *rest)
        steps.append(step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop._Run, "log", log_and_stop)
    with pytest.raises(TrainingInterruptedError):
        run_jobs(jobs, config, judges())
    assert not list(config.output_dir.rglob("*.error.txt"))
    assert run_jobs(jobs, config, judges()) == {}
    assert steps == [1, 2, 3, 4, 5, 6]
    assert rows_of(config, jobs[0])["images"] == whole


def test_a_finished_training_is_not_repeated_when_its_images_are_not_there(
    config: BenchmarkConfig, dog: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs_of(config, [dog])[1]
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_draw", lambda *arguments: 1 / 0)
        assert "ZeroDivision" in run_jobs([job], config, judges())[job.key]
    monkeypatch.setattr(dreambooth, "run", lambda config: 1 / 0)
    assert run_jobs([job], config, judges()) == {}


def test_a_training_that_diverges_is_a_result_without_images(config: BenchmarkConfig, dog: Subject) -> None:
    config.arms = {"full": {"method": "full", "learning_rate": 1e30}}
    config.training |= {"max_train_steps": 8, "max_grad_norm": 0}
    job = jobs_of(config, [dog])[1]
    assert run_jobs([job], config, judges()) == {}
    assert "not finite" in rows_of(config, job)["diverged"]
    eyes = judges()
    assert run_jobs([job], config, eyes) == {}
    assert eyes.dino.looks == 0


@pytest.mark.parametrize("killed_before_scoring", [False, True])
def test_an_arm_that_changed_is_not_taken_for_the_old_one(
    killed_before_scoring: bool, config: BenchmarkConfig, dog: Subject
) -> None:
    config.arms = {"mine": {"method": "ether", "n_blocks": 1}}
    job = jobs_of(config, [dog])[1]
    run_jobs([job], config, judges())
    if killed_before_scoring:
        (config.output_dir / "results" / f"{job.key}.json").unlink()
    config.arms["mine"]["n_blocks"] = 2
    changed = jobs_of(config, [dog])[1]
    assert changed.key == job.key
    assert "other settings" in run_jobs([changed], config, judges())[job.key]


METHODS = [name for name in registry.METHODS if name not in ("none", "peft")]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_loaded_as_it_was_trained(
    method: str, config: BenchmarkConfig, dog: Subject, tmp_path: Path
) -> None:
    """The run's own last sample, drawn with the model in memory, is drawn again."""
    settings = {**config.training, "method": method, "learning_rate": 1e-2}
    training = training_of(Job(method, settings, dog, 0), config, tmp_path / "run")
    training.num_validation_images, training.num_inference_steps, training.guidance_scale = 1, 3, 7.5
    training.validation_prompt = ["a qwe dog"]
    forget_accelerator()
    dreambooth.run(training)
    sample = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-000002" / "00.png")).astype(int)
    asked = Asked(["a qwe dog"], [0])
    arguments = {"batch_size": 1, "num_inference_steps": 3, "guidance_scale": training.guidance_scale}
    pipe = load_run(tmp_path / "run")
    pipe.unet.config.sample_size = 32 // pipe.vae_scale_factor
    again = np.asarray(next(draw(pipe, asked, **arguments))).astype(int)  # type: ignore[arg-type]
    assert np.abs(again - sample).max() <= 1
    base = load_pipeline(config.base)
    base.unet.config.sample_size = pipe.unet.config.sample_size
    before = np.asarray(next(draw(base, asked, **arguments))).astype(int)  # type: ignore[arg-type]
    assert np.abs(before - sample).max() > 3


@pytest.mark.parametrize("method", ["ether_plus", "lora", "full"])
def test_other_strengths_are_drawn_with_the_same_seeds_by_methods_that_have_one(
    method: str, config: BenchmarkConfig, dog: Subject
) -> None:
    config.arms = {"mine": {"method": method, "learning_rate": 0.05}}
    whole = jobs_of(config, [dog])[1]
    assert run_jobs([whole], config, judges()) == {}
    before = rows_of(config, whole)
    config.output_dir, config.strengths = config.output_dir.with_name("strengths"), [1e-9, 0.5]
    base, job = jobs_of(config, [dog])
    assert run_jobs([base, job], config, judges()) == {}
    found, of_base = rows_of(config, job), rows_of(config, base)
    assert [row["dino"] for row in found["images"]] == [row["dino"] for row in before["images"]]
    assert found["unrelated"] == before["unrelated"]  # drawn at 1
    assert found["bytes"] == before["bytes"] > 4 * sum(found["trained_parameters"].values())
    assert (found["settings_hash"] == before["settings_hash"]) == (method == "full")
    if method == "full":
        assert "at" not in found
        return
    assert list(found["at"]) == ["1e-09", "0.5"]
    folder = config.output_dir / found["folder"]
    for least, untouched in zip(found["at"]["1e-09"], of_base["images"], strict=True):
        assert least["dino"] == pytest.approx(untouched["dino"], abs=1e-3)
        assert (folder / least["file"]).is_file()
    half = np.array([row["dino"] for row in found["at"]["0.5"]])
    assert np.abs(half - [row["dino"] for row in found["images"]]).max() > 1e-4


def test_a_strength_of_one_is_drawn_already(config: BenchmarkConfig) -> None:
    with pytest.raises(ValueError, match="beside 1"):
        replace(config, strengths=[0.5, 1.0])
