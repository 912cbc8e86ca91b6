"""The job loop of all studies: what fails is told and the rest goes on, and processes share the jobs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ether_diffusion.evaluation import runner
from ether_diffusion.evaluation.runner import (
    Job,
    Study,
    claimed,
    hash_changes,
    run_jobs,
    run_study,
    take_share,
    why_missing,
)
from ether_diffusion.training.loop import TrainingInterruptedError


class Fake(Study[None]):
    """A study whose jobs raise what ``errors`` has under their arms."""

    def __init__(self, folder: Path, errors: dict[str, Exception]) -> None:
        self.folder, self.errors, self.done = folder, errors, list[str]()

    @property
    def output_dir(self) -> Path:
        return self.folder

    def jobs(self) -> list[Job[None]]:
        return [Job(arm, {}, None, 0, 0.1) for arm in "abc"]

    def write_outline(self, jobs: Sequence[Job[None]]) -> None:
        self.outline = [job.key for job in jobs]

    def run_job(self, job: Job[None]) -> None:
        if job.arm in self.errors:
            raise self.errors[job.arm]
        self.done.append(job.arm)

    def summarize(self, jobs: Sequence[Job[None]]) -> tuple[str, list[str]]:
        return f"done: {', '.join(self.done)}", [job.key for job in jobs if job.arm not in self.done]


def test_a_failed_job_leaves_its_reason_until_it_is_done(tmp_path: Path) -> None:
    study = Fake(tmp_path, {"b": KeyError("gone")})
    assert run_jobs(study, study.jobs()) == {"b@0.1/seed-0": "KeyError: 'gone'"}
    assert study.done == ["a", "c"]
    assert why_missing(tmp_path, "b@0.1/seed-0") == "b@0.1/seed-0 (KeyError: 'gone')"
    assert why_missing(tmp_path, "a@0.1/seed-0") == "a@0.1/seed-0 (not done yet)"
    study.errors.clear()
    assert run_jobs(study, study.jobs()) == {}
    assert why_missing(tmp_path, "b@0.1/seed-0") == "b@0.1/seed-0 (not done yet)"
    assert not list(tmp_path.rglob("*.error.txt"))


def test_a_job_of_another_process_is_left_to_it_and_done_if_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PAUSE", 0.01)
    study = Fake(tmp_path, {})
    first = study.jobs()[0].key
    with ThreadPoolExecutor(1) as pool, claimed(tmp_path, first) as mine:
        assert mine
        with claimed(tmp_path, first) as again:
            assert not again
        waiting = pool.submit(run_jobs, study, study.jobs())
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        assert study.done == ["b", "c"]
    assert waiting.result() == {}
    assert study.done == ["b", "c", "a"]


def test_the_program_prints_what_is_done_and_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Fake(tmp_path, {"b": ValueError("no")})
    with pytest.raises(SystemExit) as ended:
        run_study(lambda device: study)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.out == "done: a, c\n"
    assert "b@0.1/seed-0: ValueError: no\n1 jobs failed; the same command tries them again" in said.err
    assert study.outline == ["a@0.1/seed-0", "b@0.1/seed-0", "c@0.1/seed-0"]
    for index, own in ((0, ["a", "c"]), (1, [])):  # one of two processes does not take the other with it
        monkeypatch.setattr(runner, "take_share", lambda index=index: (index, 2))
        share = Fake(tmp_path, {"b": ValueError("no")})
        assert run_study(lambda device, share=share: share) is False
        assert share.done == own
    monkeypatch.setattr(runner, "take_share", lambda: (0, 1))
    assert run_study(lambda device: Fake(tmp_path, {})) is True


@pytest.mark.parametrize("shards", [1, 2, 3, 16])
def test_the_union_of_all_shards_is_one_run(shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for processes in (1, 2):
        for shard in range(1, shards + 1):
            for index in range(processes):
                monkeypatch.setattr(runner, "take_share", lambda index=index, count=processes: (index, count))
                study = Fake(tmp_path, {})
                run_study(lambda device, study=study: study, f"{shard}/{shards}")
                assert len(study.done) <= -(-3 // (shards * processes))
                done += study.done
        assert sorted(done) == ["a", "b", "c"]  # none left out and none done twice
        done.clear()


def test_hashes_contradict_only_where_both_are_known() -> None:
    before = {"unet": "01", "text_encoder": None, "gone": "02"}
    assert hash_changes(before, {"unet": "01", "text_encoder": "03", "vae": "04"}) == []
    assert hash_changes(before, {"unet": "05", "text_encoder": "03"}) == ["unet 01 → 05"]


def test_a_signal_and_an_impossible_setting_end_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_study(lambda device: Fake(tmp_path, {"b": TrainingInterruptedError("stopped", 15)}))
    assert ended.value.code == 128 + 15
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.error.txt"))

    def impossible(device: torch.device) -> Fake:
        raise ValueError("a setting is impossible")

    with pytest.raises(SystemExit, match="error: a setting is impossible"):
        run_study(impossible)


def test_a_process_takes_its_share_and_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is restored
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert take_share() == (1, 3)
    assert runner.os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    for visible, own in (("4,5,7", "5"), ("2", "2")):
        take_share({"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": visible})
        assert runner.os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert "WORLD_SIZE" not in runner.os.environ
    assert take_share() == (0, 1)
