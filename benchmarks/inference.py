"""Time of the UNet's forward with adapters against the base's, and of loading and switching them.

The arms take turns round by round in one process; a ratio is taken within each round. "mixed" is one batch of eight
samples with eight adapters, "8 single" the same samples one after another, each with a switch to its adapter; "two" is
a sum of two adapters.

    python benchmarks/inference.py --rounds 9
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from models import Batch, build, make_batch, predict, synchronise
from torch import nn

import ether_diffusion as ether
from ether_diffusion.playground.tiny import tiny_pipeline

SAMPLES = 8


def shake(adapter: ether.Adapter, seed: int) -> None:
    """Away from the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


@torch.no_grad()
def forward(unet: nn.Module, batch: Batch) -> None:
    predict(unet, batch)


def clocked(work: Callable[[], object], batch: Batch, cpu_time: bool) -> float:
    clock = time.process_time if cpu_time else time.perf_counter
    synchronise(batch)
    began = clock()
    work()
    synchronise(batch)
    return clock() - began


def one_round(
    pipe: DiffusionPipeline, base: UNet2DConditionModel, four: Batch, eight: Batch, cpu_time: bool
) -> dict[str, float]:
    """Seconds of every arm, once."""
    unet, names = pipe.unet, [f"adapter {i}" for i in range(SAMPLES)]
    singles = [{key: value[i : i + 1] for key, value in eight.items()} for i in range(SAMPLES)]

    def one_after_another() -> None:
        for name, single in zip(names, singles, strict=True):
            ether.set_adapters(pipe, name)
            forward(unet, single)

    found = {"base, batch 4": clocked(lambda: forward(base, four), four, cpu_time)}
    ether.set_adapters(pipe, names[0])
    found["unfused, batch 4"] = clocked(lambda: forward(unet, four), four, cpu_time)
    ether.set_adapters(pipe, names[0], 0.7)
    found["at 0.7, batch 4"] = clocked(lambda: forward(unet, four), four, cpu_time)
    ether.set_adapters(pipe, names[:2])
    found["two, batch 4"] = clocked(lambda: forward(unet, four), four, cpu_time)
    ether.set_adapters(pipe, names[0])
    ether.disable(pipe)
    found["disabled, batch 4"] = clocked(lambda: forward(unet, four), four, cpu_time)
    ether.enable(pipe)
    ether.fuse(pipe)
    forward(unet, four)  # the first one pays for the pages that fusing gave back
    found["fused, batch 4"] = clocked(lambda: forward(unet, four), four, cpu_time)
    ether.unfuse(pipe)
    found["base, batch 8"] = clocked(lambda: forward(base, eight), eight, cpu_time)
    ether.set_adapters(pipe, per_sample=names)
    found["mixed, batch 8"] = clocked(lambda: forward(unet, eight), eight, cpu_time)
    found["8 single"] = clocked(one_after_another, eight, cpu_time)
    return found


def load_and_switch(pipe: DiffusionPipeline, resident: int) -> dict[str, float]:
    """Milliseconds of loading one adapter from disk and of switching, with few and with ``resident`` adapters there."""
    with tempfile.TemporaryDirectory() as folder:
        file = ether.save(pipe, folder, "adapter 0")
        loads, switches = [], []
        for i in range(resident):
            began = time.perf_counter()
            ether.load(pipe, file, name=f"resident {i}")
            loads.append(time.perf_counter() - began)
            began = time.perf_counter()
            ether.set_adapters(pipe, f"resident {i // 2}")
            switches.append(time.perf_counter() - began)
    few = min(10, resident)
    figures = {
        "load, few resident": loads[:few],
        f"load, {resident} resident": loads[-few:],
        "switch, few resident": switches[:few],
        f"switch, {resident} resident": switches[-few:],
    }
    return {name: round(1e3 * statistics.median(values), 3) for name, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sd15", "playground"], default="sd15")
    parser.add_argument("--resolution", type=int, default=512, help="8 times the side of the latents")
    parser.add_argument("--device", default="cpu", help="cpu runs in fp32, cuda in bf16")
    parser.add_argument("--method", choices=["ether", "ether_plus"], default="ether_plus")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resident", type=int, default=1000, help="adapters to load for the switching times")
    parser.add_argument("--cpu_time", action="store_true", help="seconds of the process, for a machine that others use")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    base = build(arguments.model, device=arguments.device)
    pipe = tiny_pipeline()  # the verbs need a pipeline; of this one only the UNet is run
    pipe.register_modules(unet=copy.deepcopy(base))
    for i in range(SAMPLES):
        config = ether.EtherConfig(arguments.method, seed=i)
        shake(ether.attach(pipe.unet, config, f"adapter {i}").requires_grad_(False), i)
    four, eight = (make_batch(base, arguments.resolution, size) for size in (4, SAMPLES))
    forward(base, four)  # warm-up
    times = []
    for number in range(arguments.rounds):
        times.append(one_round(pipe, base, four, eight, arguments.cpu_time))
        print(f"round {number + 1} of {arguments.rounds}", flush=True)
    pairs = [(name, "base, batch 4" if name.endswith("4") else "base, batch 8") for name in times[0]]
    ratios = {n: round(statistics.median(seconds[n] / seconds[base] for seconds in times), 3) for n, base in pairs}
    milliseconds = load_and_switch(pipe, arguments.resident)
    machine = torch.cuda.get_device_name() if arguments.device != "cpu" else platform.processor() or platform.machine()
    print(f"\n{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{arguments.model}, {arguments.resolution} px, {arguments.method}, {arguments.rounds} rounds")
    for name, base_name in pairs:
        print(f"{name:20}{statistics.median(each[name] for each in times):>10.3f} s  {ratios[name]:.3f} of {base_name}")
    for name, value in milliseconds.items():
        print(f"{name:28}{value:>10.2f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "ratios": ratios, "milliseconds": milliseconds}))


if __name__ == "__main__":
    main()
