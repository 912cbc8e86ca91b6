"""What ``accelerate launch`` adds: it does not pass a SIGTERM on, so its death must stop the training too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ether_diffusion.training.launch import LAUNCHER_NOTE

ROOT = Path(__file__).parents[2]


def wait_for(condition: object, seconds: float = 240) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def launched(*flags: str) -> tuple[int, list[str]]:
    """Exit status and stderr of a training with a mistake in its settings under the launcher."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(ROOT / "train_dreambooth.py")]
    command += ["--pretrained_model_name_or_path", "playgruond", "--instance_data_dir", str(ROOT / "tests")]
    command += ["--instance_prompt", "a dog", "--output_dir", "/dev/null/run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    return done.returncode, done.stderr.strip().splitlines()


def test_below_an_error_it_is_said_whose_the_traceback_is() -> None:
    status, lines = launched()
    assert status == 1
    place = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    assert lines[place + 1] == LAUNCHER_NOTE
    assert lines[place + 2].startswith("Traceback")  # the launcher's; ours has none
    assert "CalledProcessError" in lines[-1]


def test_with_quiet_the_error_is_the_last_that_is_said() -> None:
    status, lines = launched("--quiet")
    assert status == 1
    assert lines[-2].startswith("error: ")
    assert lines[-1] == LAUNCHER_NOTE
    assert not any(line.startswith("Traceback") for line in lines)


def test_the_end_of_the_launcher_saves_and_stops_the_run(tmp_path: Path, photos: Path, base_folder: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", str(ROOT / "train_dreambooth.py")]
    command += ["--pretrained_model_name_or_path", str(base_folder), "--instance_data_dir", str(photos)]
    command += ["--instance_prompt", "a photo of qwe dog", "--output_dir", str(run), "--resolution", "16"]
    command += ["--max_train_steps", "100000", "--checkpointing_steps", "100000", "--num_validation_images", "0"]
    metrics = run / "metrics.jsonl"
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ.copy())
    try:
        wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=300)
        wait_for(lambda: json.loads((run / "provenance.json").read_text())["status"] == "interrupted")
    finally:
        launcher.kill()
    step = json.loads((run / "provenance.json").read_text())["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    rows = metrics.read_text()
    time.sleep(1)
    assert metrics.read_text() == rows, "the training goes on without its launcher"
