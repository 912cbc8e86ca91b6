"""Kill training, benchmark, studies and export at random moments of what they do to files; compare the results.

    python tests/kills.py --kills 120

Each program runs once without a kill. Then copies of it are killed with SIGKILL before or amid a call by which they
change a folder, and started again as a user would, until so many kills have hit. What comes out in the end must be
what the whole run gave: the same weights, pictures and metrics, the same summary. An exported file is whole or absent.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
import yaml
from helpers import before_file_calls, die
from PIL import Image, ImageDraw

from ether_diffusion.cli.programs.export import main as export_run
from ether_diffusion.cli.programs.studies import bench as benchmark
from ether_diffusion.cli.programs.studies import controls as control_study
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.private import forget_accelerator
from ether_diffusion.runs.folder import list_checkpoints
from ether_diffusion.training.dreambooth import main as dreambooth

ROOT = Path(__file__).parents[1]


def train(folder: Path) -> None:
    """Go on from the newest checkpoint, or start anew where there is none."""
    photos, base = folder.parent / "photos", folder.parent / "base"
    flags = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": photos,
        "instance_prompt": "a qwe dog",
        "output_dir": folder,
        "max_train_steps": 8,
        "checkpointing_steps": 2,
        "validation_steps": 4,
        "num_validation_images": 1,
        "num_inference_steps": 2,
        "resolution": 32,
    }
    again = ["--resume=latest"] if list_checkpoints(folder / "checkpoints") else ["--overwrite"]
    dreambooth([*(f"--{name}={value}" for name, value in flags.items()), *again])


def trained(folder: Path) -> dict[str, bytes | str]:
    """Weights, samples and metrics of a run; the header of the weights has no fixed order."""
    from safetensors.torch import load_file

    found: dict[str, bytes | str] = {
        key: value.numpy().tobytes() for key, value in load_file(folder / "ether_weights.safetensors").items()
    }
    found |= {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "samples").rglob("*.png")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if key != "steps_per_second"} for row in rows]
    return found | {"metrics": json.dumps(kept), "validation": (folder / "validation.jsonl").read_text()}


def run_benchmark(folder: Path) -> None:
    """One subject, one arm and the anchors."""
    config = yaml.safe_load((ROOT / "configs" / "eval_playground.yaml").read_text())
    config["training"] |= {"max_train_steps": 4, "checkpointing_steps": 2}
    config["arms"], config["seeds"] = {"ether_plus": {"method": "ether_plus"}}, [0]
    written = folder.parent / "benchmark.yaml"
    written.write_text(yaml.safe_dump(config))
    arguments = ["--config", str(written), "--output_dir", str(folder), "--subjects=[gift-box]"]
    benchmark([*arguments, "--images_per_prompt", "1", "--num_inference_steps", "2"])


def run_control_study(folder: Path) -> None:
    """Two arms, one of them at two rates."""
    config = {
        "training": {"pretrained_model_name_or_path": "playground", "train_data_dir": "playground"},
        "arms": {"ETHER": {"method": "ether", "learning_rate": [1e-2, 1e-3]}, "encoder alone": {"method": "none"}},
        "eval_steps": [1, 2],
        "pairs": 2,
        "curve_pairs": 1,
        "samples": 1,
        "num_inference_steps": 2,
        "segmenter": "playground",
        "clip": "playground",
    }
    config["training"] |= {"num_validation_images": 0}  # type: ignore[operator]
    written = folder.parent / "control.yaml"
    written.write_text(yaml.safe_dump(config))
    control_study(["--config", str(written), "--output_dir", str(folder)])


def studied(folder: Path) -> dict[str, str]:
    """Results of a study, without the seconds that they took and the commit, which may change meanwhile."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items() if key not in ("seconds", "git_revision")}
        return [plain(each) for each in value] if isinstance(value, list) else value

    return {
        str(path.relative_to(folder)): json.dumps(plain(json.loads(path.read_text())), sort_keys=True).replace(
            str(folder), "."
        )
        for path in (folder / "results").rglob("*.json")
    }


def export(folder: Path) -> None:
    """What a run learnt as a LoRA file, unless it is there."""
    if not (folder / "lora.safetensors").exists():
        export_run([str(folder.parent / "trained"), str(folder / "lora.safetensors")])


def exported(folder: Path) -> dict[str, bytes]:
    """The tensors of the file."""
    from safetensors.torch import load_file

    return {key: value.numpy().tobytes() for key, value in load_file(folder / "lora.safetensors").items()}


PROGRAMS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Mapping[str, Any]]]] = {
    "training": (train, trained),
    "benchmark": (run_benchmark, studied),
    "control study": (run_control_study, studied),
    "export": (export, exported),
}


def child(program: str, folder: Path, moment: int | None, counted: Any) -> None:
    """Run a program, and die at that moment."""
    forget_accelerator()
    torch.set_num_threads(1)

    def act(call: int) -> None:
        counted.value = call
        if call == moment:
            die()

    with (folder.parent / "output").open("a") as output:
        sys.stdout = sys.stderr = output
        with before_file_calls(act):
            PROGRAMS[program][0](folder)


def started(program: str, folder: Path, moment: int | None) -> tuple[int, int]:
    """Exit code, and how many moments there were."""
    forked = multiprocessing.get_context("fork")
    counted = forked.Value("q", 0)
    process = forked.Process(target=child, args=(program, folder, moment, counted))
    process.start()
    process.join()
    return int(process.exitcode or 0), int(counted.value)


def hunt(program: str, kills: int, dice: random.Random, place: Path) -> tuple[int, int, list[str]]:
    """Kill a program so often; returns kills, finished runs, and what was wrong."""
    look = PROGRAMS[program][1]
    if program == "export":
        started("training", place / "trained", None)
    code, moments = started(program, place / "whole", None)
    if code:
        raise SystemExit(f"{program} does not run:\n{(place / 'output').read_text()[-3000:]}")
    expected, hits, finished, wrong = look(place / "whole"), 0, 0, []
    while hits < kills or not finished:
        folder = place / f"run-{finished}"
        # early moments are hit more often when little is left to do, so the window is of the whole run
        code, _ = started(program, folder, dice.randrange(1, moments) if hits < kills else None)
        if code == -signal.SIGKILL:
            hits += 1
            continue
        if code:
            wrong.append(f"{program}, {folder.name}: ended with {code}: {(place / 'output').read_text()[-800:]}")
            finished += 1
            continue
        found = look(folder)
        differing = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        if differing:
            wrong.append(f"{program}, {folder.name}: {len(differing)} results differ, first {sorted(differing)[0]}")
        finished += 1
    return hits, finished, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120, help="in all, as many for each program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    given = parser.parse_args()
    problems = []
    for program in given.programs:
        with tempfile.TemporaryDirectory(prefix="ether-kills-") as temporary:
            place, began = Path(temporary), time.monotonic()
            (place / "photos").mkdir()
            for index in range(3):
                picture = Image.new("RGB", (64, 64), (60 * index, 90, 160))
                ImageDraw.Draw(picture).ellipse((8, 8, 40 + 4 * index, 50), fill=(250, 200, 70))
                picture.save(place / "photos" / f"{index}.png")
            tiny_pipeline().save_pretrained(place / "base")
            share = -(-given.kills // len(given.programs))
            hits, finished, wrong = hunt(program, share, random.Random(given.seed), place)
            problems += wrong
            seconds = time.monotonic() - began
            print(f"{program}: {hits} kills, {finished} finished runs, {len(wrong)} wrong, {seconds:.0f} s", flush=True)
    for problem in problems:
        print(problem)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
