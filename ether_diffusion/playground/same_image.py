"""Whether what a run saved is what it trained: a fresh pipeline draws the run's last sample again.

``python -m ether_diffusion.playground.same_image BASE RUN``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import diffusers
import numpy as np
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion.pipelines.verbs import load


def same_image(base: Path, run: Path) -> bool:
    """Whether a fresh pipeline over ``base`` with the run's weights draws its last sample again, bit for bit."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    first = json.loads((run / "samples" / "prompts.json").read_text())[0]
    # another number of threads sums in another order
    torch.set_num_threads(json.loads((run / "provenance.json").read_text())["threads"])
    pipe = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    if settings["sampler"] != "base":
        pipe.scheduler = getattr(diffusers, settings["sampler"]).from_config(pipe.scheduler.config)
    load(pipe, run)
    image = pipe(
        first["prompt"],
        height=settings["resolution"],
        width=settings["resolution"],
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance_scale"],
        generator=torch.Generator().manual_seed(first["seed"]),
    ).images[0]
    sample = run / "samples" / f"step-{settings['max_train_steps']:06d}" / first["file"]
    return bool(np.array_equal(np.asarray(image), np.asarray(Image.open(sample))))


def main() -> None:
    """Compare, and exit with 1 if the images differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    same = same_image(arguments.base, arguments.run)
    print(f"loaded into a fresh pipeline, the same sample bit for bit: {'yes' if same else 'NO'}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
