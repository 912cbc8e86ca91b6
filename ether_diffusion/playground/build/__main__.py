"""The command line: ``python -m ether_diffusion.playground.build FOLDER --preset cpu|gpu``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ether_diffusion.arguments import Parser
from ether_diffusion.playground import base_folder
from ether_diffusion.playground.build.presets import PRESETS, STAGES, Preset, Training
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.runner import ALL, run
from ether_diffusion.ranges import COUNT, SEED


def parser() -> argparse.ArgumentParser:
    """The options; ``--steps``, ``--minutes``, ``--batch`` and ``--lr`` take STAGE=VALUE, several of them."""
    options = Parser(prog="python -m ether_diffusion.playground.build", description=__doc__)
    options.add_argument("folder", type=Path, help="the result; replaced only when all is done")
    options.add_argument("--preset", choices=list(PRESETS), help="default: gpu where there is CUDA, else cpu")
    options.add_argument("--work", type=Path, help="drawings, checkpoints, finished stages; default: FOLDER.work")
    options.add_argument(
        "--from_build", type=Path, metavar="BASE", help="a finished build whose models go on from their weights"
    )
    options.add_argument(
        "--beside",
        type=_base,
        metavar="BASE",
        help="build the flow transformer that takes autoencoder, text tower and judges from this finished build, or "
        "from the one that is shipped (playground)",
    )
    options.add_argument("--seed", type=SEED.of(int), default=0)
    options.add_argument("--stages", nargs="+", choices=ALL, default=list(ALL), help="run only these, in build order")
    options.add_argument("--device", help="default: cuda where there is one, else cpu")
    options.add_argument("--workers", type=COUNT.of(int), default=os.cpu_count() or 1, help="processes that draw")
    options.add_argument("--scenes", type=COUNT.of(int), help="size of the drawn pool; default: the preset's")
    options.add_argument("--pairs", type=COUNT.of(int), help="pairs of drawings for dino; default: the preset's")
    for name in ("steps", "batch"):
        options.add_argument(f"--{name}", nargs="+", type=_whole, default=[], metavar="STAGE=N")
    options.add_argument("--bf16", nargs="+", choices=STAGES, default=[], help="stages in bf16 on a CPU, too")
    for name in ("minutes", "lr"):
        options.add_argument(f"--{name}", nargs="+", type=_real, default=[], metavar="STAGE=X")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Build what the command line asks for."""
    given = parser().parse_args(arguments)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    cpu = not torch.cuda.is_available() or given.device == "cpu"
    processes = PartialState(cpu=cpu)
    device = torch.device(given.device or ("cpu" if cpu else processes.device))
    preset = PRESETS[given.preset or ("gpu" if device.type == "cuda" else "cpu")]
    preset = adjust(preset, dict(given.steps), dict(given.batch), dict(given.minutes), dict(given.lr), given.bf16)
    preset = replace(preset, scenes=given.scenes or preset.scenes, pairs=given.pairs or preset.pairs)
    work = given.work or given.folder.with_name(f"{given.folder.name}.work")
    stages = tuple(stage for stage in ALL if stage in given.stages)
    run(Project(work, preset, given.seed, device, given.from_build, given.beside), given.folder, stages, given.workers)


def adjust(
    preset: Preset,
    steps: dict[str, int],
    batch: dict[str, int],
    minutes: dict[str, float],
    lr: dict[str, float],
    bf16: Sequence[str] = (),
) -> Preset:
    """The preset with other values in the :class:`Training` of the stages that are named."""
    training: dict[str, Training] = {
        stage: replace(
            default,
            steps=steps.get(stage, default.steps),
            batch=batch.get(stage, default.batch),
            minutes=minutes.get(stage, default.minutes),
            lr=lr.get(stage, default.lr),
            bf16=stage in bf16 or default.bf16,
        )
        for stage, default in preset.training.items()
    }
    return replace(preset, training=training)


def _base(name: str) -> Path:
    return Path(base_folder(name))


def _whole(text: str) -> tuple[str, int]:
    stage, value = _assignment(text)
    return stage, int(value)


def _real(text: str) -> tuple[str, float]:
    stage, value = _assignment(text)
    return stage, float(value)


def _assignment(text: str) -> tuple[str, str]:
    stage, sign, value = text.partition("=")
    if stage not in STAGES or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not STAGE=VALUE with a STAGE of {', '.join(STAGES)}")
    return stage, value


if __name__ == "__main__":
    main()
