"""The whole training program beside diffusers' own ``examples/dreambooth/train_dreambooth_lora.py``.

Both programs train the playground's base on the same pictures, from a cold start: each run is a process of its own with
an empty output folder, so that nothing is cached. Theirs trains LoRA; ours trains LoRA (of peft, same rank) and ETHER+.
Short runs and longer runs take turns. So two figures separate: a further step = (long - short) / further steps, and
the start-up = short - steps x step: imports, loading, encoding, and at the end saving, the report and the model card.
Wall time and CPU time (user + system, of the process and its children) are given; the latter is steadier on a machine
that others use.

The script is not part of this project: give its path. It needs torchvision, and a version of diffusers that is at least
its own. It logs to TensorBoard unless told otherwise; with ``--tensorboard`` ours does that too.

    python benchmarks/program.py --script train_dreambooth_lora.py --rounds 3
    python benchmarks/program.py --script train_dreambooth_lora.py --before ../old-checkout --json program.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ether_diffusion.playground import BASE
from ether_diffusion.playground.world import SUBJECTS, subject, write_subject

ROOT = Path(__file__).resolve().parents[1]
THEIRS = "diffusers' script"


@dataclass(frozen=True)
class Run:
    """What one process took.

    Attributes:
        arm: name of the program and method.
        steps: optimisation steps.
        wall: seconds from start to end.
        cpu: user and system seconds of the process and its children.
        peak_mb: its resident memory at the most.
    """

    arm: str
    steps: int
    wall: float
    cpu: float
    peak_mb: float


def run(arm: str, command: list[str], steps: int, checkout: Path, threads: int | None) -> Run:
    """Run a program once; its output is shown only where it fails.

    Raises:
        SystemExit: the program failed.
    """
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRANSFORMERS_VERBOSITY": "error"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{arm} failed:\n{output.read().decode(errors='replace')}")
    return Run(arm, steps, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def theirs(script: Path, common: list[str]) -> list[str]:
    """The command of diffusers' program."""
    return [sys.executable, str(script), *common, "--lr_warmup_steps=0", "--learning_rate=6e-4"]


def ours(checkout: Path, method: str, common: list[str], tensorboard: bool) -> list[str]:
    """The command of this project's program: no sample grids, since the other program draws none by default."""
    tracker = ["--report_to=tensorboard"] if tensorboard else []
    script = str(checkout / "train_dreambooth.py")
    return [sys.executable, script, *common, f"--method={method}", "--num_validation_images=0", *tracker]


def write_pictures(name: str, folder: Path, batch: int) -> None:
    """Write the playground's pictures of a subject: whole batches only, for the other program has no others dropped."""
    write_subject(name, folder)
    pictures = sorted(folder.iterdir())
    if len(pictures) < batch:
        raise SystemExit(f"the subject has {len(pictures)} pictures: choose a --batch of at most that")
    for path in pictures[len(pictures) // batch * batch :]:
        path.unlink()


def summary(runs: list[Run], arm: str, steps: int) -> dict[str, float]:
    """Means of an arm: the short run, the further steps, and what follows for the start-up and a step."""
    short = [each for each in runs if each.arm == arm and each.steps == steps]
    long = [each for each in runs if each.arm == arm and each.steps != steps]
    figures: dict[str, float] = {}
    for clock in ("wall", "cpu"):
        brief = statistics.fmean(getattr(each, clock) for each in short)
        further = statistics.fmean(getattr(each, clock) for each in long) - brief
        step = further / (long[0].steps - steps)
        figures |= {f"short_{clock}": brief, f"further_{clock}": further, f"step_{clock}": step}
        figures[f"start_{clock}"] = brief - steps * step
    figures["peak_mb"] = max(each.peak_mb for each in long)
    return figures


def show(runs: list[Run], arms: list[str], steps: int, more: int) -> None:
    """Print the table of means and, below it, each run."""
    print(f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}")
    print(
        f"means in seconds, wall (CPU)\n\n| program | {steps} steps | {more} further steps | "
        "start-up | ms a step | peak MB |\n|---|---:|---:|---:|---:|---:|"
    )
    for arm in arms:
        f = summary(runs, arm, steps)
        seconds = [f"{f[f'{what}_wall']:.1f} ({f[f'{what}_cpu']:.1f})" for what in ("short", "further", "start")]
        step = f"{1e3 * f['step_wall']:.0f} ({1e3 * f['step_cpu']:.0f})"
        print(f"| {arm} | {' | '.join(seconds)} | {step} | {f['peak_mb']:.0f} |")
    print("\neach run in seconds, wall (CPU):")
    for arm in arms:
        for number in (steps, steps + more):
            own = [f"{each.wall:.1f} ({each.cpu:.1f})" for each in runs if each.arm == arm and each.steps == number]
            print(f"{arm}, {number} steps: {', '.join(own)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="diffusers' train_dreambooth_lora.py")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="of the short runs")
    parser.add_argument("--more", type=int, default=100, help="further steps of the long runs")
    parser.add_argument("--methods", nargs="+", default=["lora", "ether_plus"], help="ours")
    parser.add_argument("--before", type=Path, help="another checkout of this project, measured as well")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--tensorboard", action="store_true", help="ours logs to TensorBoard, as theirs does")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the programs; torch's default without it")
    parser.add_argument("--json", type=Path, help="also write the figures and each run here")
    given = parser.parse_args()
    if not given.script.is_file():
        parser.error(f"there is no script {given.script}")
    checkouts = {"": ROOT} | ({} if given.before is None else {", before": given.before.resolve()})
    name = SUBJECTS[0]
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_pictures(name, work / "pictures", given.batch)
        settings = {
            "pretrained_model_name_or_path": BASE,
            "instance_data_dir": work / "pictures",
            "instance_prompt": f"a photo of qwe {subject(name).class_word}",
            "resolution": given.resolution,
            "train_batch_size": given.batch,
            "rank": 4,
            "seed": 0,
        }
        common = [f"--{key}={value}" for key, value in settings.items()]
        arms = {THEIRS: (theirs(given.script.resolve(), common), ROOT)}
        for label, checkout in checkouts.items():
            for method in given.methods:
                command = ours(checkout, method, common, given.tensorboard)
                arms[f"ours, {method}{label}"] = (command, checkout)
        for number in range(given.rounds):
            for steps in (given.steps, given.steps + given.more):
                for arm, (command, checkout) in arms.items():
                    with tempfile.TemporaryDirectory(dir=work) as output:
                        more = [f"--output_dir={output}/run", f"--max_train_steps={steps}"]
                        runs.append(run(arm, [*command, *more], steps, checkout, given.threads))
                    print(f"round {number + 1}, {steps} steps, {arm}: {runs[-1].wall:.1f} s", flush=True)
    show(runs, list(arms), given.steps, given.more)
    if given.json is not None:
        figures = {arm: summary(runs, arm, given.steps) for arm in arms}
        content = {"torch": torch.__version__, "means": figures, "runs": [asdict(each) for each in runs]}
        given.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
