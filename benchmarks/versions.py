"""A training step of this version beside another checkout's: two processes, of which one works at a time.

Each process has the same UNet with random weights. They take turns round by round, within a round method by method, so
that a noisy machine disturbs both alike; a ratio is taken within each round and method.

    git worktree add ../before v0.1.0
    python benchmarks/versions.py --before ../before --resolution 256 --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

WORKER = """
import sys, time, torch
import ether_diffusion as ether
from diffusers import UNet2DConditionModel
import copy, peft
settings, side, batch_size = {settings!r}, {side}, {batch_size}
torch.manual_seed(0)
base = UNet2DConditionModel(**settings).requires_grad_(False)
def arm(method):
    unet = copy.deepcopy(base, {{id(p): p for p in base.parameters()}})
    if method == "frozen":
        return unet, []
    if method == "LoRA r=4":
        names = [n for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=names), unet)
        return unet, [p for p in unet.parameters() if p.requires_grad]
    config = ether.EtherConfig({{"ETHER n=4": "ether", "ETHER+ n=4": "ether_plus"}}[method])
    return unet, list(ether.attach(unet, config).parameters())
arms = {{method: arm(method) for method in {methods!r}}}
given = torch.randn(batch_size, 4, side, side)
text = torch.randn(batch_size, 77, settings["cross_attention_dim"])
print("ready", flush=True)
for line in sys.stdin:
    unet, trained = arms[line.strip()]
    sample = given.clone().requires_grad_(not trained)
    began = time.perf_counter()
    unet(sample, torch.full((batch_size,), 500), text).sample.square().mean().backward()
    print(time.perf_counter() - began, flush=True)
    for parameter in trained:
        parameter.grad = None
"""


class Worker:
    """A process with one checkout, which does one step when it is told to."""

    def __init__(self, checkout: Path, settings: dict[str, Any], arguments: argparse.Namespace) -> None:
        code = WORKER.format(
            settings=settings,
            side=arguments.resolution // 8,
            batch_size=arguments.batch_size,
            methods=["frozen", *arguments.methods],
        )
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": str(arguments.threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        while (line := self._read()) != "ready":
            if not line:
                raise SystemExit(f"{checkout} did not start; does `import ether_diffusion` work there?")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def seconds(self, method: str) -> float:
        """Of one step."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{method}\n")
        self.process.stdin.flush()
        return float(self._read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the other version")
    parser.add_argument("--resolution", type=int, default=256, help="8 times the side of the latents")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    choices = ["ETHER n=4", "ETHER+ n=4", "LoRA r=4"]
    parser.add_argument("--methods", nargs="*", default=choices, choices=choices)
    parser.add_argument("--json", type=Path, help="also write the times here")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from ether_diffusion.playground.sd15 import UNET

    workers = {
        name: Worker(checkout, UNET, arguments) for name, checkout in (("now", ROOT), ("before", arguments.before))
    }
    methods = ["frozen", *arguments.methods]
    times: dict[tuple[str, str], list[float]] = {(name, method): [] for name in workers for method in methods}
    for number in range(arguments.rounds + 1):
        for method in methods:
            order = list(workers) if number % 2 else list(workers)[::-1]
            for name in order:
                seconds = workers[name].seconds(method)
                if number:  # the first round warms up
                    times[name, method].append(seconds)
        print(f"round {number} of {arguments.rounds}", flush=True)
    print(f"\nSD1.5, {arguments.resolution} px, batch {arguments.batch_size}, {arguments.rounds} rounds")
    heads = f"{'now / frozen':>14}{'quartiles':>18}{'before / frozen':>16}{'quartiles':>18}{'now / before':>14}"
    print(f"{'method':14}{heads}")
    for method in methods:
        cells: list[str] = []
        for name in ("now", "before"):
            ratios = [a / b for a, b in zip(times[name, method], times[name, "frozen"], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{statistics.median(ratios):>{16 if cells else 14}.3f}{f'{low:.3f} … {high:.3f}':>18}")
        both = [a / b for a, b in zip(times["now", method], times["before", method], strict=True)]
        print(f"{method:14}{''.join(cells)}{statistics.median(both):>14.3f}")
    if arguments.json:
        found = {f"{name}, {method}": values for (name, method), values in times.items()}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
