"""What a wheel installs: the command and the recipes, apart from the repository; and what it says of itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ether_diffusion.recipes import recipes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a wheel is installed that is made of what the Dockerfile copies, without the playground's weights."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for line in re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE):
        *names, target = line.split()
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / target, ignore=shutil.ignore_patterns("base", "flow"))
            else:
                (source / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, source / target)
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


def test_the_description_is_the_readme_without_links_that_lead_nowhere(installed: Path) -> None:
    (metadata,) = installed.glob("ether_diffusion-*.dist-info/METADATA")
    said = metadata.read_text(encoding="utf-8").partition("\n\n")[2]
    assert said.startswith("# ether-diffusion\n")
    assert 'pipe("a photo of qwe dog in a bucket")' in said
    targets = re.findall(r"\]\(([^)\s]+)\)", said)
    assert targets
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
