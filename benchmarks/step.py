"""Time and memory of a training step of each method against the frozen model.

A step is the forward and the backward that training needs; "frozen" is the forward and the backward to the input,
which no method can do without. The methods take turns round by round in one process, so that a noisy machine disturbs
all alike: a ratio is taken within each round, and the table has the median over rounds. Memory is that of two steps
with AdamW; on a CPU its peak is the high-water mark of a process of its own for each method. A model on a GPU is in
bf16, peft's adapters with it; the vectors of ETHER are fp32 always.

    python benchmarks/step.py --resolution 512 --rounds 9 --json step-512.json
    python benchmarks/step.py --model playground --rounds 50
    python benchmarks/step.py --model playground --rounds 25 --cpu_time --methods "ETHER+ n=4" "ETHER+ n=4, peft"
    python benchmarks/step.py --model playground --rounds 25 \
        --arms configs/eval_playground.yaml configs/eval_playground_peft.yaml
    python benchmarks/step.py --model sd3 --resolution 512 1024 --device cuda --rounds 30
    python benchmarks/step.py --model flux --layers 4 --device cuda --rounds 30 --compile blocks
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from arms import ARMS, Arm, of_benchmark
from models import MODELS, Batch, build, compile_blocks, latents, make_batch, predict, synchronise
from torch import Tensor, nn

from ether_diffusion.evaluation.paper.blocks import kept_bytes


def loss(model: nn.Module, parameters: list[nn.Parameter], batch: Batch) -> Tensor:
    """The squared error of the prediction; without anything to train, for the gradient of the latents."""
    name = latents(batch)
    noisy = batch[name].clone().requires_grad_(not parameters)
    return nn.functional.mse_loss(predict(model, batch | {name: noisy}), batch["target"])


def seconds(model: nn.Module, parameters: list[nn.Parameter], batch: Batch, cpu_time: bool) -> float:
    """Seconds of one forward and backward."""
    clock = time.process_time if cpu_time else time.perf_counter
    synchronise(batch)
    began = clock()
    loss(model, parameters, batch).backward()
    synchronise(batch)
    elapsed = clock() - began
    for parameter in parameters:
        parameter.grad = None
    return elapsed


def memory(model: nn.Module, parameters: list[nn.Parameter], batch: Batch) -> dict[str, float]:
    """MB: what autograd keeps of a forward (distinct storages, weights aside), the optimiser's state, and the peak."""
    own = [*model.parameters(), *model.buffers(), *parameters]
    if batch["target"].is_cuda:
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(parameters or [nn.Parameter(torch.zeros(()))], lr=0.0)
    for _ in range(2):
        saved = kept_bytes(lambda: loss(model, parameters, batch).backward(), own)
        optimizer.step()
        optimizer.zero_grad()
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    found = {"saved": saved, "optimizer": sum(v.nbytes for v in state), "peak": peak_bytes(batch)}
    return {name: round(value / 1e6, 1) for name, value in found.items()}


def peak_bytes(batch: Batch) -> int:
    """The high-water mark of the device's memory, or of this process (``ru_maxrss`` starts at its parent's)."""
    if batch["target"].is_cuda:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_in_a_process(name: str, resolution: int, batch_size: int, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory_of", name, "--model", arguments.model]
    command += ["--resolution", str(resolution), "--batch_size", str(batch_size)]
    if arguments.arms:
        command += ["--arms", *map(str, arguments.arms)]
    if arguments.layers:
        command += ["--layers", str(arguments.layers)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    print(f"memory of {name}: {found}", flush=True)
    return found


Arms = dict[str, tuple[nn.Module, list[nn.Parameter]]]
"""Every method's model, and what it trains."""


def known_arms(arguments: argparse.Namespace) -> dict[str, Arm]:
    """The arms of this program, or those of benchmarks beside the frozen model."""
    if arguments.arms is None:
        return ARMS
    arms = {"frozen": ARMS["frozen"]}
    for path in arguments.arms:
        theirs = of_benchmark(path)
        if twice := sorted(arms.keys() & theirs.keys()):
            raise SystemExit(f"--arms: {path} has an arm {twice[0]!r}, which is there already: rename one of the two")
        arms |= theirs
    return arms


def make_arms(arguments: argparse.Namespace) -> Arms:
    """The models of all methods; the frozen weights are shared, only what a method adds is its own."""
    base = build(arguments.model, arguments.layers, arguments.device)
    arms = {}
    for name in dict.fromkeys(["frozen", *arguments.methods]):
        model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        arms[name] = (model, known_arms(arguments)[name](model))
    if arguments.compile:  # now that all are there: attaching an adapter makes torch forget compiled code
        for model, _ in arms.values():
            compile_blocks(model) if arguments.compile == "blocks" else model.compile()
    return arms


def rounds(arms: Arms, batch: Batch, arguments: argparse.Namespace) -> dict[str, Any]:
    """The times of all methods, round by round."""
    for name, arm in arms.items():  # warm-up
        began = time.perf_counter()
        for _ in range(2):
            seconds(*arm, batch, arguments.cpu_time)
        print(f"{name}: warm after {time.perf_counter() - began:.1f} s", flush=True)
    gc.collect()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(arguments.rounds):
        for name, arm in arms.items():
            times[name].append(seconds(*arm, batch, arguments.cpu_time))
        if not batch["target"].is_cuda:
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
    rows = {}
    for name, (_, parameters) in arms.items():
        ratios = [mine / reference for mine, reference in zip(times[name], times["frozen"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2
        rows[name] = {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "seconds": round(statistics.median(times[name]), 4),
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(quartile, 3) for quartile in quartiles],
        }
    return rows


def show(facts: dict[str, Any], rows: dict[str, Any]) -> None:
    """Print one table."""
    print(f"\n{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}")
    layers = f", {facts['layers']} layers" if facts["layers"] else ""
    print(
        f"{facts['model']}{layers}, {facts['resolution']} px, batch {facts['batch_size']}, {facts['rounds']} rounds"
        + (f", compiled ({facts['compile']})" if facts["compile"] else "")
        + (", CPU time" if facts["cpu_time"] else "")
    )
    print(f"{'method':18}{'parameters':>12}{'ms':>9}{'step / frozen':>15}{'quartiles':>16}  peak, saved, optimiser MB")
    for name, row in rows.items():
        low, high = row["quartiles"]
        mb = row.get("memory")
        shown = f"{mb['peak']:>8} {mb['saved']:>8} {mb['optimizer']:>6}" if mb else ""
        milliseconds = f"{1e3 * row['seconds']:>9.1f}"
        print(
            f"{name:18}{row['parameters']:>12,}{milliseconds}{row['ratio']:>15.3f}{f'{low:.3f} … {high:.3f}':>16}"
            f"  {shown}",
            flush=True,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="sd15")
    parser.add_argument("--layers", type=int, help="a shallower transformer, with layers of the same size")
    parser.add_argument("--resolution", type=int, nargs="+", help="8 times the side of the latents")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cpu", help="cpu runs in fp32, cuda in bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", help=f"default: all of {', '.join(ARMS)}; or of --arms")
    parser.add_argument(
        "--arms", type=Path, nargs="+", help="take the methods from the arms of these benchmarks' configs"
    )
    parser.add_argument("--cpu_time", action="store_true", help="seconds of the process, for a machine that others use")
    parser.add_argument(
        "--compile",
        choices=["whole", "blocks"],
        help="time what torch.compile makes of each: of the model, or of its transformer blocks, which share one code; "
        "memory is eager",
    )
    parser.add_argument(
        "--no_cudnn_attention", action="store_true", help="FLUX's backward fails in cuDNN's with torch 2.11 on an H200"
    )
    parser.add_argument("--no_memory", action="store_true", help="leave memory out")
    parser.add_argument("--json", type=Path, help="also write the tables here")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    known = list(known_arms(arguments))
    arguments.methods = arguments.methods or known
    if unknown := [name for name in arguments.methods if name not in known]:
        parser.error(f"there is no method {unknown[0]!r}; there are {', '.join(known)}")
    arguments.resolution = arguments.resolution or [MODELS[arguments.model].pixels]
    return arguments


def main() -> None:
    arguments = parse()
    torch.backends.cuda.enable_cudnn_sdp(not arguments.no_cudnn_attention)
    torch._dynamo.config.recompile_limit = 64  # all methods compile the same functions in this process
    if arguments.memory_of:
        model = build(arguments.model, arguments.layers)
        batch = make_batch(model, arguments.resolution[0], arguments.batch_size[0])
        print(json.dumps(memory(model, known_arms(arguments)[arguments.memory_of](model), batch)))
        return
    on_cpu = arguments.device == "cpu"
    sizes = list(itertools.product(arguments.resolution, arguments.batch_size))
    names = [] if arguments.no_memory else list(dict.fromkeys(["frozen", *arguments.methods]))
    used: dict[tuple[int, int], dict[str, Any]] = {size: {} for size in sizes}
    if on_cpu:  # before this process is large: its children would begin with its memory
        used = {size: {name: memory_in_a_process(name, *size, arguments) for name in names} for size in sizes}
    arms = make_arms(arguments)
    machine = platform.processor() or platform.machine() if on_cpu else torch.cuda.get_device_name()
    tables = []
    for resolution, batch_size in sizes:
        batch = make_batch(arms["frozen"][0], resolution, batch_size)
        if not on_cpu and not arguments.compile:
            used[resolution, batch_size] = {name: memory(*arms[name], batch) for name in names}
        rows = rounds(arms, batch, arguments)
        for name, found in used[resolution, batch_size].items():
            rows[name]["memory"] = found
        facts = {name: getattr(arguments, name) for name in ("model", "layers", "rounds", "compile", "cpu_time")}
        facts |= {"resolution": resolution, "batch_size": batch_size}
        facts |= {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
        show(facts, rows)
        tables.append(facts | {"rows": rows})
        if arguments.json:
            arguments.json.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
