"""Operations of a training step of each method, counted on torch's meta device: no machine's speed is in it.

On a GPU every operation launches a kernel, and in small batches launches are what a step waits for. Traffic is what the
operations read and write; in large batches elementwise ones and thin products take as long as that does. Views are
neither. Forward and backward are those of step.py, in bf16 without autocast. Attention is counted as the fused kernel
that a GPU has for it, which the meta device would take apart.

    python benchmarks/launches.py
    python benchmarks/launches.py --resolution 512 --batch_size 8 --methods "ETHER+ n=4" "LoRA r=4" --by_operation
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any
from unittest import mock

import torch
from arms import ARMS
from diffusers.utils import logging
from models import MODELS, build, make_batch
from step import loss
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
METHODS = [name for name in ARMS if not name.startswith("BOFT")]
"""peft's BOFT looks at its values, of which the meta device has none."""
FREE = {
    *("_unsafe_view", "detach", "alias", "lift_fresh", "promote_types", "is_same_size"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
"""Operations that launch nothing, beside the views."""


class Launches(TorchDispatchMode):
    """Counts operations by name, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()
        self.traffic = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in FREE:
            self.of[name] += 1
            self.traffic += sum(each.nbytes for each in tree_iter((args, kwargs, found)) if isinstance(each, Tensor))
        return found


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
    """What ``scaled_dot_product_attention`` is on a GPU in half precision."""
    found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return found


def count(name: str, arguments: argparse.Namespace) -> Launches:
    """One step of an arm."""
    with torch.device("meta"):
        unet = build(arguments.model, arguments.layers, "meta").to(DTYPES[arguments.dtype])
        parameters = ARMS[name](unet)
        batch = make_batch(unet, arguments.resolution, arguments.batch_size)
        with Launches() as launches, mock.patch.object(functional, "scaled_dot_product_attention", fused_attention):
            loss(unet, parameters, batch).backward()
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in MODELS if name != "playground"], default="sd15")
    parser.add_argument("--layers", type=int, help="a shallower transformer, with layers of the same size")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--by_operation", action="store_true", help="what each method adds to the frozen step")
    arguments = parser.parse_args()
    logging.set_verbosity_error()  # it warns of casting to bf16
    what = f"{arguments.resolution} px, batch {arguments.batch_size}, {arguments.dtype}"
    print(f"{arguments.model}, {what}, torch {torch.__version__}")
    print(f"{'method':18}{'launches':>10}{'/ frozen':>10}{'traffic, GB':>13}{'/ frozen':>10}")
    frozen = count("frozen", arguments)
    for name in dict.fromkeys(["frozen", *arguments.methods]):
        found = count(name, arguments)
        launches, traffic = found.of.total() / frozen.of.total(), found.traffic / frozen.traffic
        print(f"{name:18}{found.of.total():>10,}{launches:>10.2f}{found.traffic / 1e9:>13.1f}{traffic:>10.2f}")
        if arguments.by_operation and name != "frozen":
            more = Counter(found.of)
            more.subtract(frozen.of)
            print("   " + ", ".join(f"{operation} {number:+}" for operation, number in more.most_common() if number))


if __name__ == "__main__":
    main()
