"""Time and memory of a training step of each method against the frozen model.

A step is the forward and the backward that training needs; "frozen" is the forward and the backward to the input,
which no method can do without. The methods take turns round by round in one process, so that a noisy machine disturbs
all alike: a ratio is taken within each round, and the table has the median over rounds. On a CPU peak memory is the
high-water mark of a process of its own for each method, two steps with AdamW.

    python benchmarks/step.py --resolution 512 --rounds 9 --json step-512.json
    python benchmarks/step.py --model playground --rounds 50
    python benchmarks/step.py --device cuda --rounds 30 --compile
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, build
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ether_diffusion.evaluation.kept import kept_bytes

Batch = dict[str, Tensor]


def make_batch(unet: UNet2DConditionModel, resolution: int, batch_size: int) -> Batch:
    side, like = resolution // 8, unet.conv_in.weight
    shapes = {
        "sample": (4, side, side),
        "noise": (4, side, side),
        "prompt_embeds": (77, unet.config.cross_attention_dim),
    }
    batch = {name: torch.randn(batch_size, *shape).to(like) for name, shape in shapes.items()}
    return batch | {"timesteps": torch.full((batch_size,), 500, device=like.device)}


def loss(unet: UNet2DConditionModel, parameters: list[nn.Parameter], batch: Batch) -> Tensor:
    sample = batch["sample"].clone().requires_grad_(not parameters)
    prediction = unet(sample, batch["timesteps"], batch["prompt_embeds"]).sample
    return nn.functional.mse_loss(prediction, batch["noise"])


def seconds(unet: UNet2DConditionModel, parameters: list[nn.Parameter], batch: Batch, cpu_time: bool) -> float:
    """Seconds of one forward and backward."""
    clock = time.process_time if cpu_time else time.perf_counter
    synchronise(batch)
    began = clock()
    loss(unet, parameters, batch).backward()
    synchronise(batch)
    elapsed = clock() - began
    for parameter in parameters:
        parameter.grad = None
    return elapsed


def synchronise(batch: Batch) -> None:
    if batch["sample"].is_cuda:
        torch.cuda.synchronize()


def memory(unet: UNet2DConditionModel, parameters: list[nn.Parameter], batch: Batch) -> dict[str, float]:
    """MB: what autograd keeps of a forward (distinct storages, weights aside), the optimiser's state, and the peak."""
    own = [*unet.parameters(), *unet.buffers(), *parameters]
    optimizer = torch.optim.AdamW(parameters or [nn.Parameter(torch.zeros(()))], lr=0.0)
    for _ in range(2):
        saved = kept_bytes(lambda: loss(unet, parameters, batch).backward(), own)
        optimizer.step()
        optimizer.zero_grad()
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    found = {"saved": saved, "optimizer": sum(v.nbytes for v in state), "peak": peak_bytes(batch)}
    return {name: round(value / 1e6, 1) for name, value in found.items()}


def peak_bytes(batch: Batch) -> int:
    """The high-water mark of the device's memory, or of this process (``ru_maxrss`` starts at its parent's)."""
    if batch["sample"].is_cuda:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_in_a_process(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory_of", name, "--model", arguments.model, "--device", arguments.device]
    command += ["--resolution", str(arguments.resolution), "--batch_size", str(arguments.batch_size)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    print(f"memory of {name}: {found}", flush=True)
    return found


def rounds(arguments: argparse.Namespace, base: UNet2DConditionModel, batch: Batch) -> dict[str, Any]:
    """The times of all methods, round by round."""
    models = {}
    for name in dict.fromkeys(["frozen", *arguments.methods]):
        # the frozen weights are shared by all the models; only what a method adds is its own
        unet = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        models[name] = (unet, ARMS[name](unet))
    for model in models.values():  # now that all are there: attaching an adapter makes torch forget compiled code
        if arguments.compile:
            model[0].compile()
        seconds(*model, batch, arguments.cpu_time)  # warm-up
        gc.collect()
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(arguments.rounds):
        for name, model in models.items():
            times[name].append(seconds(*model, batch, arguments.cpu_time))
        print(f"round {number + 1} of {arguments.rounds}", flush=True)
    rows = {}
    for name, (_, parameters) in models.items():
        ratios = [mine / reference for mine, reference in zip(times[name], times["frozen"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2
        rows[name] = {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "seconds": round(statistics.median(times[name]), 4),
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(quartile, 3) for quartile in quartiles],
        }
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sd15", "playground"], default="sd15")
    parser.add_argument("--resolution", type=int, help="8 times the side of the latents; 512, 128 for the playground")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu runs in fp32, cuda in bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--cpu_time", action="store_true", help="seconds of the process, for a machine that others use")
    parser.add_argument("--compile", action="store_true", help="time what torch.compile makes of each; memory is eager")
    parser.add_argument("--no_memory", action="store_true", help="leave memory out")
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--memory_of", choices=list(ARMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.resolution = arguments.resolution or {"sd15": 512, "playground": 128}[arguments.model]
    return arguments


def main() -> None:
    arguments = parse()
    # before this process is large: its children would begin with its memory
    names = [] if arguments.memory_of or arguments.no_memory else dict.fromkeys(["frozen", *arguments.methods])
    used = {name: memory_in_a_process(name, arguments) for name in names}
    base = build(arguments.model)
    if arguments.device != "cpu":
        base.to(arguments.device, torch.bfloat16)
    batch = make_batch(base, arguments.resolution, arguments.batch_size)
    if arguments.memory_of:
        print(json.dumps(memory(base, ARMS[arguments.memory_of](base), batch)))
        return
    rows = rounds(arguments, base, batch)
    for name, found in used.items():
        rows[name]["memory"] = found
    machine = torch.cuda.get_device_name() if arguments.device != "cpu" else platform.processor() or platform.machine()
    print(f"\n{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{arguments.model}, {arguments.resolution} px, batch {arguments.batch_size}, {arguments.rounds} rounds"
        + (", compiled" if arguments.compile else "")
    )
    print(f"{'method':18}{'parameters':>12}{'step / frozen':>15}{'quartiles':>16}  peak, saved, optimiser MB")
    for name, row in rows.items():
        low, high = row["quartiles"]
        mb = row.get("memory")
        shown = f"{mb['peak']:>8} {mb['saved']:>8} {mb['optimizer']:>6}" if mb else ""
        print(f"{name:18}{row['parameters']:>12,}{row['ratio']:>15.3f}{f'{low:.3f} … {high:.3f}':>16}  {shown}")
    if arguments.json:
        facts = {name: getattr(arguments, name) for name in ("model", "resolution", "batch_size", "rounds", "compile")}
        facts |= {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
