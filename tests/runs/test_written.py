"""``--overwrite`` removes what a run of the toolkit wrote, and nothing else; inputs are never where a run writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.helpers import draw_photo, provenance

from ether_diffusion.cli.programs.demo import main as demo_main
from ether_diffusion.evaluation.controls.settings import ControlStudyConfig
from ether_diffusion.evaluation.controls.study import ControlStudy, all_jobs
from ether_diffusion.evaluation.runner import check_study_inputs, remove_training
from ether_diffusion.runs.written import RECORD, is_run, note_written, remove_written, written

Train = Callable[..., Path]

SHORT: dict[str, Any] = {"max_train_steps": 1, "resolution": 16}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, *names: str) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the user's {name}")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    "name", ["README.md", "config.yaml", "samples/1.png", "checkpoints/model.ckpt", "unet/1.bin", "scores.json"]
)
def test_a_folder_that_never_was_a_run_is_never_cleared(
    name: str, overwrite: bool, train: Train, tmp_path: Path
) -> None:
    put(tmp_path / "run", name, "notes.txt")
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match=f"holds {name}, which no run of this toolkit wrote"):
        train(overwrite=overwrite, method="full" if "unet" in name else "ether", **SHORT)
    assert content(tmp_path) == before


def test_provenance_of_another_tool_makes_no_run(train: Train, tmp_path: Path) -> None:
    put(tmp_path / "run", "README.md")
    (tmp_path / "run" / "provenance.json").write_text(json.dumps({"author": "somebody"}))
    with pytest.raises(FileExistsError, match=r"provenance\.json, README\.md"):
        train(overwrite=True, **SHORT)


def test_overwriting_a_run_keeps_what_others_put_beside_its_files(train: Train) -> None:
    common: dict[str, Any] = SHORT | {"num_validation_images": 1}
    run = train(**common)
    stale = run / "checkpoints" / "step-000001"
    theirs = put(
        run, "notes.txt", "samples/mine.png", "samples/more/1.png", "checkpoints/old.ckpt", "class_images/a.png"
    )
    train(overwrite=True, seed=1, **common)
    assert {name: (run / name).read_bytes() for name in theirs} == theirs
    assert stale.is_dir()
    assert provenance(run)["status"] == "finished"
    remove_written(run)
    left = {name for name in content(run) if not name.startswith("cache/")}
    assert left == set(theirs)


@pytest.mark.parametrize("name", ["samples/step-000001/mine.png", "checkpoints/step-000001/mine.txt", "unet/mine.txt"])
def test_a_file_that_the_new_run_would_replace_is_named(name: str, train: Train) -> None:
    run = train(**SHORT)
    put(run, name)
    before = content(run)
    with pytest.raises(FileExistsError, match=f"holds {name}, which no run of this toolkit wrote"):
        train(overwrite=True, method="full" if "unet" in name else "ether", **SHORT)
    assert content(run) == before


@pytest.mark.parametrize("method", ["full", "lora", "oft"])
def test_the_record_names_all_that_a_method_writes(method: str, train: Train) -> None:
    if method != "full":
        pytest.importorskip("peft")
    run = train(method=method, num_validation_images=1, **SHORT)
    assert set(content(run)) - {RECORD} == {
        str(path.relative_to(run)) for path in [*written(run), *(run / "cache").rglob("*.safetensors")]
    }
    train(method=method, overwrite=True, **SHORT)


def test_a_run_of_0_1_is_overwritten_without_a_record(train: Train) -> None:
    run = train(num_validation_images=1, **SHORT)
    (run / RECORD).unlink()
    theirs = put(run, "samples/mine.png")
    train(overwrite=True, **SHORT)
    assert (run / "samples" / "mine.png").read_bytes() == theirs["samples/mine.png"]


def test_a_record_of_a_stranger_leads_nowhere_else(tmp_path: Path) -> None:
    """A run folder may be copied from somebody: links and names out of it are not followed."""
    theirs = put(tmp_path, "photos/1.png", "secret.txt")
    run = tmp_path / "run"
    note_written(run, [run / "config.yaml"])
    with (run / RECORD).open("a") as record:
        for name in ("../secret.txt", str(tmp_path / "secret.txt"), "samples/1.png", "samples/../../secret.txt"):
            record.write(json.dumps(name) + "\n")
        record.write('"torn')
    (run / "samples").symlink_to(tmp_path / "photos")
    assert is_run(run)
    remove_written(run)
    assert {name: (tmp_path / name).read_bytes() for name in theirs} == theirs
    assert (run / "samples").is_symlink()


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("instance_data_dir", "samples"),
        ("instance_data_dir", ""),
        ("class_data_dir", "samples/class"),
        ("cache_dir", "checkpoints/cache"),
        ("pretrained_model_name_or_path", "unet"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_an_input_where_the_run_writes_is_refused_before_anything_is_written(
    setting: str, place: str, there: bool, train: Train, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if there:
        train(**SHORT)
    draw_photo(run / place / "0.png")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=rf"^{setting} "):
        train(**SHORT | {"overwrite": True, setting: run / place})
    assert content(tmp_path) == before


def test_a_link_to_a_place_where_the_run_writes_is_that_place(train: Train, tmp_path: Path) -> None:
    draw_photo(tmp_path / "run" / "samples" / "0.png")
    (tmp_path / "photos").symlink_to(tmp_path / "run" / "samples")
    with pytest.raises(ValueError, match="which the run itself writes"):
        train(instance_data_dir=tmp_path / "photos", overwrite=True, **SHORT)


def test_a_study_keeps_what_is_not_its_own(train: Train, tmp_path: Path) -> None:
    run = train(**SHORT, with_prior_preservation=True, class_prompt="a dog", num_class_images=1)
    (run / "job.txt").write_text("mark")
    other = shutil.copytree(run, tmp_path / "other")
    remove_training(run)
    assert not run.exists()
    theirs = put(other, "notes.txt", "samples/mine.png")
    remove_training(other)
    assert content(other) == theirs
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"data .* is in .*runs, which the run itself writes"):
        check_study_inputs(tmp_path, {"data": tmp_path / "runs"})


def test_a_study_of_controls_does_not_clear_pictures_of_others(tmp_path: Path) -> None:
    study = ControlStudy(
        ControlStudyConfig(tmp_path, arms={"a": {}}, training={"train_data_dir": "playground"}),
        "cpu",  # type: ignore[arg-type]
    )
    job = study_job(study)
    theirs = put(tmp_path / "images" / job.key / "000200", "mine.png")
    with pytest.raises(ValueError, match="holds what no study drew"):
        study._score(job, tmp_path / "runs", 200)
    assert content(tmp_path / "images" / job.key / "000200") == theirs


def study_job(study: ControlStudy) -> Any:
    study.__dict__["pairs"], study.__dict__["_identity"] = [], lambda job: "identity"
    return all_jobs(study.config)[0]


def test_the_demo_leaves_photos_of_others_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = put(tmp_path / "subject", "00.png")
    with pytest.raises(SystemExit):
        demo_main([str(tmp_path)])
    assert "holds what the demo did not draw" in capsys.readouterr().err
    assert content(tmp_path / "subject") == theirs
