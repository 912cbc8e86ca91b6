"""What a person reads from a whole training: on a terminal, in a log, with --quiet, from several processes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from training.helpers import draw_photo

ROOT = Path(__file__).parents[2]
Flags = Callable[..., list[str]]
SIX = {"max_train_steps": 6, "num_validation_images": 1, "validation_steps": 6, "validation_prompt": "a dog"}


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    draw_photo(tmp_path / "own" / "0.png")
    (tmp_path / "own" / "broken.jpg").write_text("none")
    return tmp_path / "own"


def ether(*flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ether_diffusion.cli", "train", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_log_has_lines_alone_and_no_message_of_a_library(flags: Flags, own_photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = ether(*flags(run, instance_data_dir=own_photos, **SIX))
    assert ended.returncode == 0, ended.stderr
    assert "\r" not in ended.stderr + ended.stdout
    assert "\x1b" not in ended.stderr + ended.stdout
    lines = ended.stderr.splitlines()
    patterns = [
        r"loading the base .*",
        rf"warning: skipping {own_photos / 'broken.jpg'}: not a picture.*",
        rf"1 of 2 files in {own_photos} are left out",
        r"training ETHER\+",
        *[rf"  {row} +\S.*" for row in ("base", "trained", "settings", "pictures", "steps", "samples", "device")],
        r"  time +told after 5 steps.*",
        rf"  result +{run}",
        rf"samples of step 0: {run / 'samples' / 'step-000000'}",
        r"\d+\.\d\d s a step: about \d+ s for the 1 steps and 1 set of samples that are left; .* of memory in use",
        r"step 6 of 6: loss \d\.\d{4}, rate 6\.00e-03, \d+ s left",
        rf"samples of step 6: {run / 'samples' / 'step-000006'}",
    ]
    unexpected = [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in patterns)]
    assert unexpected == []
    assert len(lines) == len(patterns), lines
    assert ended.stdout.startswith("ETHER+ finished: 6 of 6 steps in ")


def test_quiet_prints_warnings_alone(flags: Flags, own_photos: Path, tmp_path: Path) -> None:
    ended = ether(*flags(tmp_path / "run", instance_data_dir=own_photos, **SIX), "--quiet")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"warning: skipping {own_photos / 'broken.jpg'}")
    assert "quiet" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


def test_debug_shows_the_traceback_of_an_error(flags: Flags, tmp_path: Path) -> None:
    wrong = flags(tmp_path / "run", instance_data_dir=tmp_path / "nowhere")
    assert "Traceback" not in ether(*wrong).stderr
    ended = ether(*wrong, "--log_level", "debug")
    assert ended.returncode == 2
    assert "debug: traceback\nTraceback (most recent call last):" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: image folder ")


def test_a_terminal_has_one_bar_and_messages_above_it(flags: Flags, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "ether_diffusion.cli", "train", *flags(tmp_path / "run", **SIX)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    screen = b""
    try:
        while chunk := os.read(ours, 65536):
            screen += chunk
    except OSError:  # the other end is closed
        pass
    process.communicate()
    assert process.returncode == 0
    parts = [part.strip() for part in re.split(r"[\r\n]+", screen.decode())]
    bars = {part.partition(":")[0] for part in parts if "%|" in part}
    assert {"training", "drawing samples"} <= bars <= {"training", "drawing samples", "encoding pictures"}
    assert f"samples of step 6: {tmp_path / 'run' / 'samples' / 'step-000006'}" in parts
    assert not any(re.match(r"step \d+ of", part) for part in parts)


@pytest.mark.slow
def test_of_two_processes_one_prints(flags: Flags, own_photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517"]
    command += ["-m", "ether_diffusion.cli", "train", *flags(tmp_path / "run", instance_data_dir=own_photos, **SIX)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    for once in ("loading the base", "training ETHER+", "skipping", "samples of step 0:", "step 6 of 6:"):
        assert ended.stderr.count(once) == 1, once
    assert ", 2 processes, " in ended.stderr
    assert ended.stdout.count("report: ") == 1
