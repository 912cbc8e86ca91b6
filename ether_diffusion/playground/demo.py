"""The main job from end to end on a laptop: draw a robot, train on it, load the result, compare.

``python -m ether_diffusion.playground.demo FOLDER`` needs neither weights nor the Hub. The base has random weights,
so its images are noise before and after: the demo shows that every step runs, not what finetuning looks like.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image

import ether_diffusion as ether
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


def same_image(base: Path, run: Path) -> bool:
    """Whether a fresh pipeline over ``base`` with the run's weights draws its last sample again, bit for bit."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    # another number of threads sums in another order
    torch.set_num_threads(json.loads((run / "provenance.json").read_text())["threads"])
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    ether.load(pipe, run)
    side = settings["resolution"]
    image = pipe(
        settings["instance_prompt"],
        height=side,
        width=side,
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance_scale"],
        generator=torch.Generator().manual_seed(settings["validation_seed"]),
    ).images[0]
    sample = run / "samples" / f"step-{settings['max_train_steps']:06d}" / "00.png"
    return bool(np.array_equal(np.asarray(image), np.asarray(Image.open(sample))))


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
    same = same_image(folder / "base", run)
    print(f"loaded into a fresh pipeline, the same sample bit for bit: {'yes' if same else 'NO'}")
    print(f"report: {(run / 'report.html').resolve()}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
