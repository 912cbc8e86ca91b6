"""The best step of a run: samples are scored while it trains, `best/` has that step's adapter, and a resume agrees."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from training.helpers import provenance, same_tensors, trained
from training.test_resume import Unplugged, assert_same_run, unplug

import ether_diffusion as ether
import ether_diffusion.training.choosing as choosing
import ether_diffusion.training.loop as loop
from ether_diffusion.metrics.backbones import Dino
from ether_diffusion.pipelines.file import FILE_NAME, AdapterFile
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.playground.world import subject, true_pictures, write_subject
from ether_diffusion.runs.record import read_run
from ether_diffusion.runs.scores import score_run

__all__ = ["unplug"]

Train = Callable[..., Path]
Likeness = Callable[[Sequence[float]], None]

JUDGED: dict[str, Any] = {
    "dino": "playground",
    "clip": "playground",
    "class_prompt": "a photo of a dog",
    "num_validation_images": 1,
    "resolution": 32,
    "max_train_steps": 6,
    "checkpointing_steps": 2,
    "validation_steps": 1,
    "validation_prompt": "qwe dog in the snow",
}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "sample_scores.jsonl").read_text().splitlines()]


def vectors(path: Path) -> dict[str, Any]:
    return dict(AdapterFile.read(path).states)


@pytest.fixture
def likeness(monkeypatch: pytest.MonkeyPatch) -> Likeness:
    """``likeness([0.1, 0.5, 0.3])``: steps 0, 1, 2 … have these likenesses, and all the same CLIP-T."""

    def give(values: Sequence[float]) -> None:
        def score(run: Any, step: int, *_: object) -> dict[str, float]:
            return {"step": step, "dino": values[step], "dino_nearest": 0.5, "clip_t": 0.3}

        monkeypatch.setattr(choosing, "references_of", lambda *_: None)
        monkeypatch.setattr(choosing, "score_step", score)
        monkeypatch.setattr(loop, "write_report", lambda *_: None)  # a second each

    return give


def test_best_holds_the_adapter_of_the_best_step(train: Train, likeness: Likeness) -> None:
    likeness([0.9, 0.1, 0.5, 0.3, 0.5, 0.2, 0.4])
    run = train(**JUDGED, ema_decay=0.5)
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4, 5, 6]
    assert read_run(run).best_step == 2
    assert provenance(run)["files"] == {FILE_NAME: 6, f"best/{FILE_NAME}": 2}
    assert same_tensors(vectors(run / "best"), vectors(run / "checkpoints" / "step-000002"))
    assert not same_tensors(vectors(run / "best"), vectors(run))


def test_load_takes_the_last_step_and_the_best_if_asked(train: Train, likeness: Likeness, tmp_path: Path) -> None:
    likeness([0, 0.1, 0.5, 0.3, 0.2, 0.2, 0.2])
    run = train(**JUDGED)
    for place, more in (("last", {}), ("best", {"subfolder": "best"})):
        pipe = tiny_pipeline()
        ether.load(pipe, run, **more)
        ether.save(pipe, tmp_path / place)
    assert same_tensors(vectors(tmp_path / "last"), vectors(run / "checkpoints" / "step-000006"))
    assert same_tensors(vectors(tmp_path / "best"), vectors(run / "checkpoints" / "step-000002"))


def test_the_scores_are_those_of_the_run_scored_afterwards(train: Train) -> None:
    run = train(**JUDGED)
    last = rows(run)[-1]
    scores = score_run(run, choosing.load_judges("playground", "playground"))
    assert last["dino"] == pytest.approx(scores["DINO"]["finetuned"], abs=1e-6)
    assert last["dino_nearest"] == pytest.approx(scores["nearest reference"]["finetuned"], abs=1e-6)
    assert last["clip_t"] == pytest.approx(scores["CLIP-T"]["finetuned"], abs=1e-6)
    assert last["references"] == pytest.approx(scores["DINO"]["references"], abs=1e-6)
    assert rows(run)[0]["dino"] == pytest.approx(scores["DINO"]["base"], abs=1e-6)


def test_judges_do_not_change_what_is_trained(train: Train) -> None:
    judged = train("judged", **JUDGED)
    plain = train("plain", **JUDGED | {"dino": None, "clip": None})
    assert same_tensors(trained(judged, 6), trained(plain, 6))
    assert not (plain / "best").exists()
    assert not (plain / "sample_scores.jsonl").exists()


@pytest.mark.parametrize(("stop", "best"), [(2, 1), (2, 2), (3, 3), (5, 4), (5, 5), (5, 6)])
def test_a_resumed_run_has_the_same_best(
    stop: int, best: int, train: Train, unplug: Callable[[int], None], likeness: Likeness
) -> None:
    """Whether the best step is before, at or after the checkpoint that it goes on from, or after the cut."""
    likeness([0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1][:best] + [0.5] + [0.2] * (6 - best))
    whole = train("whole", **JUDGED)
    unplug(stop)
    with pytest.raises(Unplugged):
        train("parts", **JUDGED)
    parts = train("parts", resume="latest", **JUDGED)
    assert_same_run(parts, whole, 6)
    assert rows(parts) == rows(whole)
    assert same_tensors(vectors(parts / "best"), vectors(whole / "best"))
    assert provenance(parts)["files"] == provenance(whole)["files"] == {FILE_NAME: 6, f"best/{FILE_NAME}": best}


def test_the_record_says_which_step_is_kept_before_anything_else_is_done(
    train: Train, likeness: Likeness, settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    likeness([0.0, 0.1, 0.5, 0.2, 0.2, 0.2, 0.2])

    def killed(run: Any, *_: object, **__: object) -> None:
        if run.step == 2:
            raise Unplugged

    monkeypatch.setattr(loop._Run, "update", killed)
    with pytest.raises(Unplugged):
        train("run", **JUDGED)
    run = read_run(settings("run", **JUDGED).output_dir)
    assert (run.best_step, run.kept_step) == (2, 2)


def test_a_method_without_an_adapter_file_has_the_scores_alone(
    train: Train, likeness: Likeness, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("peft")
    likeness([0.0, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    changes = JUDGED | {"method": "lora"}
    run = train(**changes | {"max_train_steps": 4})
    train(**changes | {"resume": "latest"})
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4, 5, 6]
    assert read_run(run).best_step == 1
    assert not (run / "best").exists()
    assert "no adapter of the best step" not in caplog.text


def test_an_earlier_checkpoint_forgets_a_later_best(
    train: Train, likeness: Likeness, caplog: pytest.LogCaptureFixture
) -> None:
    likeness([0, 0.1, 0.3, 0.2, 0.2, 0.5, 0.4])
    whole = train(**JUDGED)
    assert read_run(whole).best_step == 5
    kept = vectors(whole / "checkpoints" / "step-000002")
    train(**JUDGED | {"max_train_steps": 4, "resume": "step-000002"})
    assert [row["step"] for row in rows(whole)] == [0, 1, 2, 3, 4]
    assert provenance(whole)["files"][f"best/{FILE_NAME}"] == 2
    assert same_tensors(vectors(whole / "best"), kept)


def test_early_stopping_ends_after_so_many_scored_steps_without_a_better_one(train: Train, likeness: Likeness) -> None:
    likeness([0, 0.1, 0.5, 0.3, 0.4, 0.9, 0.9])
    run = train(**JUDGED | {"early_stopping": 2, "checkpointing_steps": 3})
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4]
    known = provenance(run)
    assert (known["status"], known["step"], known["stopped_early"]) == ("finished", 4, True)
    assert known["files"] == {FILE_NAME: 4, f"best/{FILE_NAME}": 2}
    assert "4 of 6 steps, stopped early" in (run / "report.html").read_text()
    before = vectors(run), vectors(run / "best")
    again = train(**JUDGED | {"early_stopping": 2, "checkpointing_steps": 3, "resume": "latest"})
    assert same_tensors(before, (vectors(again), vectors(again / "best")))
    assert provenance(again)["step"] == 4


def test_a_run_that_gets_its_judges_later_scores_its_base_too(train: Train) -> None:
    quiet = JUDGED | {"dino": None, "clip": None}
    train(**quiet | {"max_train_steps": 2})
    run = train(**JUDGED | {"resume": "latest", "max_train_steps": 4})
    assert sorted(row["step"] for row in rows(run)) == [0, 2, 3, 4]
    assert read_run(run).best_step in (2, 3, 4)


def test_running_out_of_memory_costs_the_scores_of_a_step_alone(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = choosing.score_step

    def score(run: Any, step: int, *others: Any) -> Any:
        if step == 3:
            raise torch.OutOfMemoryError("no room")
        return original(run, step, *others)

    monkeypatch.setattr(choosing, "score_step", score)
    run = train(**JUDGED)
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 4, 5, 6]
    assert "out of memory while scoring step 3" in caplog.text


def test_other_judges_at_a_resume_are_named(
    train: Train, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(**JUDGED | {"max_train_steps": 2})
    monkeypatch.setattr("ether_diffusion.metrics.backbones.weights_hash", lambda model: "others")
    train(**JUDGED | {"max_train_steps": 4, "resume": "latest"})
    assert "another set of judges of the samples" in caplog.text


def test_truth_likeness_is_scored_for_subjects_of_the_playground(train: Train, tmp_path: Path) -> None:
    photos = write_subject("clown-fish", tmp_path / "photos")
    common = JUDGED | {"instance_data_dir": photos, "instance_prompt": "a photo of a qwe fish", "max_train_steps": 1}
    common |= {"class_prompt": "a photo of a fish"}
    asked = subject("clown-fish").requests[0]
    run = train("known", **common | {"validation_prompt": [asked.prompt.format(token="qwe"), "a qwe fish in a cup"]})
    dino = Dino("playground")
    drawn = dino.image_features([run / "samples" / "step-000001" / "00.png"])  # the other prompt's truth is not known
    true = dino.image_features(true_pictures(subject("clown-fish"), asked, 4))
    assert rows(run)[-1]["truth"] == pytest.approx(float((drawn @ true.T).mean()), abs=1e-6)
    assert "truth" not in rows(train("unknown", **common | {"validation_prompt": "a qwe fish in a cup"}))[-1]


def test_each_of_several_subjects_has_a_best_of_its_own(
    train: Train, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "subjects" / name).mkdir(parents=True)
        for photo in photos.iterdir():
            (tmp_path / "subjects" / name / photo.name).write_bytes(photo.read_bytes())
    at = {"cat": 1, "dog": 3}

    def score(run: Any, step: int, *_: object) -> dict[str, float]:
        return {"step": step, "dino": float(step == at[run.folder.name]), "dino_nearest": 0.5, "clip_t": 0.3}

    monkeypatch.setattr(choosing, "references_of", lambda *_: None)
    monkeypatch.setattr(choosing, "score_step", score)
    common = JUDGED | {"subjects_dir": tmp_path / "subjects", "instance_data_dir": Path(), "max_train_steps": 4}
    common |= {"instance_prompt": "a photo of qwe {subject}", "class_prompt": "a photo of a {subject}"}
    run = train(**common)
    for name, step in at.items():
        assert provenance(run / name)["files"][f"best/{FILE_NAME}"] == step
    assert same_tensors(vectors(run / "dog" / "best"), vectors(run / "checkpoints" / "step-000004" / "dog" / "best"))
    again = train(**common | {"resume": "step-000002"})
    for name, step in at.items():
        assert provenance(again / name)["files"][f"best/{FILE_NAME}"] == step


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dino": "playground"}, "add clip, or leave out both"),
        ({"dino": "playground", "clip": "playground", "num_validation_images": 0}, "draw at least 1"),
        ({"early_stopping": 2}, "name the judges, dino and clip"),
    ],
)
def test_what_cannot_be_scored_is_refused(changes: dict[str, Any], told: str, settings: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=told):
        settings(**changes)
