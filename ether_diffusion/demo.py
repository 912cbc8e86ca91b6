"""The main job from end to end on a laptop: draw a robot, train on it, load the result, compare.

``python -m ether_diffusion.playground.demo FOLDER`` needs neither weights nor the Hub. The base has random weights,
so its images are noise before and after: the demo shows that every step runs, not what finetuning looks like.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from ether_diffusion.playground.same_image import same_image
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.playground.world import write_subject

SUBJECT = "striped-robot"


def train(folder: Path, config: Path) -> Path:
    """Run ``accelerate launch train_dreambooth.py`` on the drawn subject; return the run folder."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--num_cpu_threads_per_process", str(os.cpu_count()), str(root / "train_dreambooth.py")]
    command += ["--config", str(config), "--pretrained_model_name_or_path", str(folder / "base")]
    command += ["--instance_data_dir", str(folder / "subject"), "--output_dir", str(folder / "run"), "--overwrite"]
    subprocess.run(command, check=True)
    return folder / "run"


def main() -> None:
    """Run the demo in the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[2] / "configs" / "demo.yaml")
    arguments = parser.parse_args()
    folder = arguments.folder
    write_subject(SUBJECT, folder / "subject")
    tiny_pipeline().save_pretrained(folder / "base")
    run = train(folder, arguments.config)
    print("loading the result into a fresh pipeline …", flush=True)
    same = same_image(folder / "base", run)
    print(f"loaded into a fresh pipeline, the same sample bit for bit: {'yes' if same else 'NO'}")
    print("the base has random weights: its images are noise before and after, what counts is that they are the same")
    print(f"report: {(run / 'report.html').resolve()}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
