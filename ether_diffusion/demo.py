"""The steps of the main job on the playground: draw a subject, learn it, load the result, score it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from ether_diffusion import playground
from ether_diffusion.logs import hide_loading_bars
from ether_diffusion.metrics.judges import load_judges
from ether_diffusion.playground.same_image import same_image
from ether_diffusion.playground.world import write_subject
from ether_diffusion.runs.folder import list_checkpoints, read_provenance
from ether_diffusion.runs.record import read_run
from ether_diffusion.runs.scores import score_run

SUBJECT = "striped-robot"


def train(folder: Path, config: Path) -> Path:
    """Run ``accelerate launch -m ether_diffusion.cli train`` on the drawn subject; return the run folder.

    A run that was stopped goes on; a finished one is made anew.

    Raises:
        subprocess.CalledProcessError: the training failed; it has said why.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())  # which the launcher sets to 1 by itself
    command += ["--num_cpu_threads_per_process", threads, "-m", "ether_diffusion.cli", "train"]
    command += ["--config", str(config), "--instance_data_dir", str(folder / "subject")]
    run = folder / "run"
    unfinished = list_checkpoints(run / "checkpoints") and read_provenance(run).get("status") != "finished"
    if find_spec("peft") is not None:
        command += ["--export_lora", "diffusers"]
    command += ["--output_dir", str(run), *(["--resume", "latest"] if unfinished else ["--overwrite"])]
    subprocess.run(command, check=True)
    return run


def draw_photos(folder: Path) -> None:
    """Draw the subject, unless it is there.

    Raises:
        FileExistsError: the folder holds other files.
    """
    with tempfile.TemporaryDirectory() as temporary:
        drawn = {path.name: path.read_bytes() for path in write_subject(SUBJECT, Path(temporary) / "s").iterdir()}
    there = {path.name: path.read_bytes() if path.is_file() else None for path in _inside(folder)}
    if there and there != drawn:
        raise FileExistsError(f"{folder} holds what the demo did not draw: give another folder, or move it away")
    if not there:
        write_subject(SUBJECT, folder)


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def show_result(run: Path) -> bool:
    """Score the run, draw its sample again in a fresh pipeline, and print what came out.

    Returns:
        Whether the fresh pipeline drew the same picture.
    """
    hide_loading_bars()
    scores = score_run(run, load_judges(playground.NAME, playground.NAME))
    for metric, row in scores.items():
        print(f"{metric:26} base {row['base']:.3f}, finetuned {row['finetuned']:.3f}")
    same = same_image(Path(playground.base_folder(read_run(run).base)), run)
    print(f"loaded into a fresh pipeline, the same sample bit for bit: {'yes' if same else 'NO'}")
    print(f"report: {(run / 'report.html').resolve()}")
    return same
