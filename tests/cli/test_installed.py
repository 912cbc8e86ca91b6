"""What a wheel installs: the command and the recipes, apart from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ether_diffusion.recipes import recipes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which a wheel of this checkout is installed; the playground's weights are left out."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "ether_diffusion", source / "ether_diffusion", ignore=shutil.ignore_patterns("base", "flow"))
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *alone, "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *alone, "--target", folder / "site", wheel], check=True)
    return folder / "site"


def test_the_command_finds_the_recipes_of_its_own_installation(installed: Path, tmp_path: Path) -> None:
    """With a recipe, a setting that is impossible is all that stops this run: the recipe has been read."""
    command = [str(installed / "bin" / "ether"), "train", "--config", "demo", "--instance_data_dir", "dog"]
    command += ["--output_dir", "run", "--max_train_steps", "0"]
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "ether train: max_train_steps must be at least 1, not 0"
    files = {path.name: path.read_bytes() for path in (installed / "ether_diffusion" / "configs").iterdir()}
    assert files == {path.name: path.read_bytes() for path in recipes().values()}
