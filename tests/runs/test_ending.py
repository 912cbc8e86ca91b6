"""The end of a training: what was made, the scores, and Python lines that run as they are printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs.test_model_card import make_run

from ether_diffusion.page.text import data_size
from ether_diffusion.private import forget_accelerator
from ether_diffusion.runs.ending import ending, runnable
from ether_diffusion.runs.record import read_run
from ether_diffusion.training.control import main as train_control
from ether_diffusion.training.dreambooth import main as train_subject

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Any:
    forget_accelerator()
    yield
    forget_accelerator()


def printed_code(text: str) -> str:
    """The Python lines of what a program printed."""
    return text.partition("\nPython that loads it and draws:\n\n")[2]


def run_elsewhere(code: str, folder: Path) -> np.ndarray:
    """The picture that the lines save, run by a fresh Python in another folder."""
    folder.mkdir()
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in folder.iterdir()] == ["picture.png"]
    with Image.open(folder / "picture.png") as image:
        return np.array(image)


@pytest.fixture
def small(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a small training, by paths that hold in the current folder alone."""
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(base_folder)
    return ["--pretrained_model_name_or_path=base", "--max_train_steps=2", "--resolution=32", "--output_dir=run"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ether_plus", "full"])
def test_the_printed_lines_load_and_draw(
    method: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos").mkdir()
    Image.new("RGB", (32, 32), (200, 60, 10)).save("photos/a.png")
    flags = [*small, "--instance_data_dir=photos", '--instance_prompt=a "qwe" dog', f"--method={method}"]
    train_subject([*flags, "--num_validation_images=0", "--n_blocks=4"])
    text = capsys.readouterr().out
    assert " finished: 2 of 2 steps in " in text.splitlines()[0]
    assert f"weights and samples: run, {data_size(read_run('run').result_bytes)} of weights\n" in text
    assert "\nreport: run/report.html\n" in text
    assert run_elsewhere(printed_code(text), tmp_path / "elsewhere").shape == (64, 64, 3)


@pytest.mark.slow
def test_the_printed_lines_draw_under_a_control(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_control([*small, "--train_data_dir=playground", "--num_validation_images=1", "--num_inference_steps=2"])
    assert run_elsewhere(printed_code(capsys.readouterr().out), tmp_path / "elsewhere").ndim == 3


def test_scores_and_the_best_step_stand_beside_the_base(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "scores of" not in ending([run])
    rows = [
        {"step": step, "dino": dino, "dino_nearest": 0.5, "clip_t": 0.3 - step / 1e5}
        for step, dino in ((0, 0.2), (200, 0.7), (1400, 0.6))
    ]
    (run / "sample_scores.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    line = "scores of step 1400: DINO 0.600 (base 0.200), CLIP-T 0.286 (base 0.300); the best step is 200"
    assert line in ending([run]).splitlines()
    (run / "sample_scores.jsonl").write_text(f"{json.dumps(rows[2])}\n")
    assert "scores of step 1400: DINO 0.600, CLIP-T 0.286" in ending([run]).splitlines()


@pytest.mark.parametrize(
    ("precision", "lines"),
    [
        ("bf16", ['pipe.to("cuda", torch.bfloat16)', "import torch"]),
        ("fp16", ['pipe.to("cuda")']),
        ("no", ['pipe.to("cuda")']),
    ],
)
def test_what_was_trained_on_a_gpu_is_drawn_there(precision: str, lines: list[str], tmp_path: Path) -> None:
    run = make_run(tmp_path, mixed_precision=precision)
    assert "cuda" not in runnable(read_run(run))
    facts = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(facts | {"device": "cuda:0"}))
    code = runnable(read_run(run)).splitlines()
    assert set(lines) <= set(code)
    assert code.index(lines[0]) == next(n for n, line in enumerate(code) if line.startswith("image = ")) - 1


def test_every_result_of_several_is_named(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("a", "b")]
    text = ending(folders)
    for folder in folders:
        assert f"\nreport: {folder / 'report.html'}\n" in text
    assert text.count("Python that loads") == 1
