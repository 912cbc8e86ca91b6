"""Many subjects in one run against as many runs one after another: time, memory, and whether the results are the same.

Whole trainings of the playground's subjects, without samples, as ``train_dreambooth.py`` does them; by turns in one
process, so that a noisy machine disturbs both alike. "training" is what the runs themselves record as their time, from
the first step to the end; "whole" has the loading of the base and the encoding of the photos as well.

    python benchmarks/many_subjects.py --subjects 8 --steps 100 --rounds 3

(Not ``concurrent.py``: a program of that name would hide the standard library from Python.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file

from ether_diffusion.playground.world import SUBJECTS, subject, write_subject
from ether_diffusion.private import forget_accelerator
from ether_diffusion.runs.folder import read_provenance
from ether_diffusion.training import dreambooth
from ether_diffusion.training.dreambooth_config import DreamBoothConfig


def train(**settings: Any) -> tuple[float, Path]:
    """Seconds of a whole run, and its folder."""
    forget_accelerator()
    config = DreamBoothConfig("playground", **settings)
    began = time.perf_counter()
    dreambooth.run(config)
    return time.perf_counter() - began, config.output_dir


def difference(one: Path, other: Path) -> float:
    """Norm of the difference of two runs' vectors, relative to the vectors."""
    left, right = (load_file(run / "ether_weights.safetensors") for run in (one, other))
    square = sum(float((left[key] - right[key]).square().sum()) for key in right)
    return float((square / sum(float(value.square().sum()) for value in right.values())) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="ether_plus", choices=("ether", "ether_plus"))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    diffusers_logging.disable_progress_bar()
    names = SUBJECTS[: given.subjects]
    if given.subjects > len(SUBJECTS):
        parser.error(f"the playground has {len(SUBJECTS)} subjects")
    common: dict[str, Any] = {
        "method": given.method,
        "max_train_steps": given.steps,
        "checkpointing_steps": given.steps,
        "validation_steps": given.steps,
        "num_validation_images": 0,
        "overwrite": True,
    }
    whole: list[float] = []
    training: list[float] = []
    apart: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name in names:
            write_subject(name, work / "photos" / name)
            (work / "photos" / name / "prompt.txt").write_text(f"a photo of qwe {subject(name).class_word}")
        for _ in range(given.rounds):
            together, run = train(
                output_dir=work / "all", subjects_dir=work / "photos", instance_prompt="{subject}", **common
            )
            singles = [
                train(
                    output_dir=work / f"alone-{name}",
                    instance_data_dir=work / "photos" / name,
                    instance_prompt=f"a photo of qwe {subject(name).class_word}",
                    **common,
                )
                for name in names
            ]
            seconds = [read_provenance(folder)["seconds"] for _, folder in singles]
            whole.append(together / sum(second for second, _ in singles))
            training.append(read_provenance(run / names[0])["seconds"] / sum(seconds))
            apart.append(max(difference(run / name, folder) for name, (_, folder) in zip(names, singles, strict=True)))
            print(f"one run / {len(names)} runs: whole {whole[-1]:.3f}, training {training[-1]:.3f}", flush=True)
    figures = {
        "subjects": len(names),
        "steps": given.steps,
        "method": given.method,
        "threads": torch.get_num_threads(),
        "whole": statistics.median(whole),
        "training": statistics.median(training),
        "largest_difference": max(apart),
    }
    print(json.dumps(figures, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
