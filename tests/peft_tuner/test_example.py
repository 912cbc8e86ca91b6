"""What the docs and the example tell a reader to type is executed, on a small base in place of Stable Diffusion."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from ether_diffusion.pipelines.file import AdapterFile
from ether_diffusion.playground.world import write_subject

ROOT = Path(__file__).parents[2]
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_the_example_trains_saves_and_draws(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_subject("striped-robot", tmp_path / "dog")
    options = ["--base", str(base_folder), "--images", str(tmp_path / "dog"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["peft_in_diffusers.py", *options, "--steps", "3", "--resolution", "64"])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(ROOT / "examples" / "peft_in_diffusers.py"), run_name="__main__")
    assert "step 0: loss" in capsys.readouterr().out
    assert (tmp_path / "out" / "sample.png").is_file()
    states = AdapterFile.read(tmp_path / "out" / "ether").states["unet"]
    assert any(not torch.equal(states[key], states[key[:-1] + "u"]) for key in states if key.endswith(".v"))


def test_the_code_of_the_page_runs(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block.replace(SD15, str(base_folder)), names)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"peft-dog", "peft-small", "dog", "peft-again"}
