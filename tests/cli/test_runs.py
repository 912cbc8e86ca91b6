"""A verb does what its script does, and ends as programs end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training.helpers import checkpoints, metrics, same_tensors, trained

from ether_diffusion.cli import dispatch, main
from ether_diffusion.training.control import main as train_control

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
ETHER = [sys.executable, "-m", "ether_diffusion.cli"]

Flags = Callable[[Path], list[str]]


def assert_same_run(left: Path, right: Path) -> None:
    assert checkpoints(left) == checkpoints(right)
    step = int(checkpoints(left)[-1].removeprefix("step-"))
    assert trained(left, step)
    assert same_tensors(trained(left, step), trained(right, step))
    assert metrics(left) == metrics(right)
    assert {path.name for path in left.iterdir()} == {path.name for path in right.iterdir()}


def test_the_verb_under_the_launcher_trains_what_the_script_trains(subject_flags: Flags, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"]
    launched = [*launcher, "-m", "ether_diffusion.cli", "train", *subject_flags(tmp_path / "verb")]
    script = [sys.executable, "train_dreambooth.py", *subject_flags(tmp_path / "script")]
    for command in (launched, script):
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
        assert ended.returncode == 0, ended.stderr
        assert "report: " in ended.stdout
    assert_same_run(tmp_path / "verb", tmp_path / "script")


def test_control_trains_what_its_script_trains(control_flags: Flags, tmp_path: Path) -> None:
    before = list(sys.argv)
    main(["control", *control_flags(tmp_path / "verb")])
    assert sys.argv == before
    train_control(control_flags(tmp_path / "program"))
    assert_same_run(tmp_path / "verb", tmp_path / "program")


def test_report_writes_the_page_of_a_run(
    subject_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", *subject_flags(tmp_path / "dog")])
    capsys.readouterr()
    main(["report", str(tmp_path / "dog"), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert "dog" in (tmp_path / "page.html").read_text()


def test_a_study_runs_below_its_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", "coverage", "--rounds", "20", "--output_dir", str(tmp_path)])
    assert (tmp_path / "coverage.md").read_text().strip() == capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--sed=3"], "ether train: "),
        (["train", "--config=dreambooth_sd51"], "ether train: there is no config file dreambooth_sd51, did you mean "),
        (["control", "--train_data_dir"], "ether control: "),
        (
            ["bench", "--config=eval_playground", "--output_dir=out", "--protocol=nowhere"],
            "error: nowhere is no ",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    line, rest = capsys.readouterr().err.split("\n", 1)
    assert line.startswith(said)
    assert rest == ""


def test_a_missing_folder_is_bad_input_as_well(
    subject_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", *subject_flags(tmp_path / "run"), f"--instance_data_dir={tmp_path / 'nowhere'}"])
    assert ended.value.code == 2
    assert f"error: image folder {tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--config=nowhere", "out"], ["photos/0.png/out"]])
def test_the_demo_refuses_bad_input(
    arguments: list[str], subject_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    assert ended.value.code == 2
    assert not Path("out").exists()


def test_a_bug_is_not_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(dispatch, "resolve_name", lambda target: broken)
    with pytest.raises(ValueError, match="a defect"):
        main(["report", "run"])


def test_ctrl_c_in_a_run_ends_with_130_and_no_traceback(subject_flags: Flags, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*ETHER, "train", *subject_flags(run), "--max_train_steps=100000", "--resolution=16"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 2:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "--resume latest goes on from there" in said


def test_ctrl_c_in_a_program_that_does_not_expect_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "resolve_name", lambda target: lambda arguments: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        main(["study", "coverage", "--output_dir=out"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


def test_ctrl_c_while_a_program_is_imported_cannot_be_swallowed_by_a_library() -> None:
    code = """
import signal
from ether_diffusion.cli import dispatch

def imported(target):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass
    return lambda arguments: print("half imported")

dispatch.resolve_name = imported
dispatch.main(["train"])
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr.endswith("stopped\n")
