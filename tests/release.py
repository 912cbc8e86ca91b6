"""Install a wheel into an empty environment outside of the checkout, and use it there as a newcomer would.

    python tests/release.py dist/ether_diffusion-*.whl

Makes a virtual environment of nothing but the wheel, its extra ``study`` and the versions of ``constraints.txt``. In an
empty folder, without network for models: ``ether doctor``, ``demo``, ``train``, ``sample``, ``export``, ``report``; and
every command of README and docs that needs no checkout is parsed there. Prints the seconds of each step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = ("--max_train_steps", "20", "--validation_steps", "20", "--num_validation_images", "1")
PROMPTS = ("--prompts", "a qwe robot on a meadow", "--seeds", "0", "1", "--strengths", "0", "1")


@dataclass(frozen=True)
class Step:
    """A command, what it must leave behind, and what it must print."""

    name: str
    command: Sequence[str]
    made: Sequence[str] = ()
    says: str = ""


def steps(environment: Path, wheel: Path) -> list[Step]:
    """From an empty environment to an exported adapter."""
    python, ether = str(environment / "bin/python"), str(environment / "bin/ether")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    where = "import ether_diffusion, pathlib; print(pathlib.Path(ether_diffusion.__file__).resolve())"
    return [
        Step("environment", [sys.executable, "-m", "venv", str(environment)]),
        Step("install torch", [*install, "torch"]),
        Step("install the wheel", [*install, f"{wheel}[study]"]),
        Step("import", [python, "-c", where], says=str(environment.resolve())),
        Step("doctor", [ether, "doctor"], says="Packages"),
        Step("demo", [ether, "demo", "demo"], ["demo/run/report.html"], "the same sample bit for bit: yes"),
        Step(
            "train",
            [ether, "train", "--config", "demo", "--instance_data_dir", "demo/subject", "--output_dir", "run", *SHORT],
            ["run/ether_weights.safetensors", "run/report.html", "run/README.md"],
        ),
        Step("sample", [ether, "sample", "run", *PROMPTS], ["pictures/grid-00.png"]),
        Step("export", [ether, "export", "run", "robot.safetensors", "--format", "kohya"], ["robot.safetensors"]),
        Step("report", [ether, "report", "run", "demo/run", "--output", "both.html"], ["both.html"]),
        Step("commands of the documents", [python, str(ROOT / "tests/commands.py"), "--installed"], says=" 0 faults"),
    ]


def take(step: Step, folder: Path) -> float:
    """Take a step in a folder; return its seconds.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    started = time.perf_counter()
    ended = subprocess.run(
        step.command,
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.perf_counter() - started
    missing = [name for name in step.made if not (folder / name).is_file()]
    if ended.returncode or missing or step.says not in ended.stdout:
        wanted = f"; missing: {missing}; to be said: {step.says!r}"
        raise SystemExit(f"{ended.stdout[-4000:]}\n{step.name} failed, status {ended.returncode}{wanted}")
    return seconds


def main() -> None:
    """Take all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel.resolve()
    with tempfile.TemporaryDirectory(prefix="ether-release-") as name:
        folder = Path(name) / "work"
        folder.mkdir()
        for step in steps(Path(name) / "environment", wheel):
            print(f"{step.name:26}{take(step, folder):8.1f} s", flush=True)


if __name__ == "__main__":
    main()
