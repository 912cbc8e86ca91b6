"""The paper's formulas as dense fp64 matrices, written apart from the package: the oracle of these tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ether_diffusion import Adapter
from ether_diffusion.core.targets import find_targets, root_of

DIRECT = {torch.float64: 2e-6, torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Largest error of one projection over its largest output: a few roundings of its dtype, and of the fp32 vectors."""


def block_diagonal(blocks: list[Tensor]) -> Tensor:
    return torch.block_diag(*blocks)


def reflection(u: Tensor) -> Tensor:
    """ETHER's H = I - 2 u uᵀ / (u·u) per block, (d, d) fp64; differentiable."""
    blocks = []
    for row in u.double():
        blocks.append(torch.eye(len(row), dtype=torch.float64) - 2 * row[:, None] * row[None, :] / (row * row).sum())
    return block_diagonal(blocks)


def relaxed(u: Tensor, v: Tensor) -> Tensor:
    """ETHER+'s H⁺ = I - u uᵀ / (u·u) + v vᵀ / (v·v) per block, (d, d) fp64; differentiable."""
    blocks = []
    for a, b in zip(u.double(), v.double(), strict=True):
        eye = torch.eye(len(a), dtype=torch.float64)
        blocks.append(eye - a[:, None] * a / (a * a).sum() + b[:, None] * b / (b * b).sum())
    return block_diagonal(blocks)


def free_lengths(u: Tensor, v: Tensor) -> Tensor:
    """I - u uᵀ + v vᵀ per block, (d, d) fp64; differentiable."""
    pairs = zip(u.double(), v.double(), strict=True)
    return block_diagonal([torch.eye(len(a), dtype=torch.float64) - a[:, None] * a + b[:, None] * b for a, b in pairs])


def anchored(u: Tensor, anchor: Tensor) -> Tensor:
    """H(anchor) H(u) per block, (d, d) fp64; differentiable."""
    return reflection(anchor) @ reflection(u)


def dense_weight(weight: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
    """W' of the paper, (out, in) fp64, for the vectors of one projection by name; differentiable in them.

    With a vector ``anchor`` it is that of the anchored variant.

    Of a fused Linear they are named ``u.<part>``: attention or q, k, v from the first feature on, then the MLP; what is
    left over stays as it is.
    """
    rows, columns = weight.shape

    def transform(width: int, dense: Callable[..., Tensor], *names: str) -> Tensor:
        own = [key.removeprefix(names[0]) for key in vectors if key.partition(".")[0] == names[0]]
        parts = [part for part in ("", ".attention", ".q", ".k", ".v", ".mlp") if part in own]
        blocks = [dense(*(vectors[name + part] for name in names)) for part in parts]
        rest = torch.eye(width - sum(map(len, blocks)), dtype=torch.float64)
        return block_diagonal([*blocks, rest])

    vectors_there = {key.partition(".")[0] for key in vectors}
    if "blocks" in vectors_there:
        return weight.double() @ transform(columns, lambda blocks: block_diagonal(list(blocks.double())), "blocks")
    if "anchor" in vectors_there:
        return weight.double() @ transform(columns, anchored, "u", "anchor")
    if "v" not in vectors_there:
        return weight.double() @ transform(columns, reflection, "u")
    weight = weight.double() @ transform(columns, relaxed, "u", "v")
    return transform(rows, relaxed, "u_out", "v_out") @ weight if "u_out" in vectors_there else weight


def shake(module: nn.Module, seed: int = 1, scale: float = 0.3) -> None:
    """Move all parameters off their initial values, so that u ≠ v and nothing is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter))


def vectors_of(adapter: Adapter, path: str) -> dict[str, Tensor]:
    """The adapter's vectors for one projection, by name."""
    methods = adapter.methods()
    return methods[path].state_dict(keep_vars=True) if path in methods else {}


def replace_weights(model: nn.Module, strengths: Mapping[Adapter, float]) -> None:
    """Write W + Σ s (W' - W) into the model itself, computed densely: what the adapters should amount to."""
    root = root_of(model)
    modules = {target.path: target.module for target in find_targets(root, ("*",))}
    with torch.no_grad():
        for path in dict.fromkeys(path for adapter in strengths for path in adapter.methods()):
            weight = modules[path].weight
            assert isinstance(weight, Tensor)
            total = weight.double()
            for adapter, strength in strengths.items():
                if vectors := vectors_of(adapter, path):
                    total = total + strength * (dense_weight(weight, vectors) - weight.double())
            weight.copy_(total)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest error over the largest value of the reference."""
    value, reference = value.detach().double(), reference.detach().double()
    return ((value - reference).abs().max() / reference.abs().max()).item()


def unet_inputs(seed: int = 3, text_width: int = 32, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10] * batch),
        "encoder_hidden_states": torch.randn(batch, 5, text_width, generator=generator),
    }


@contextmanager
def before_file_calls(act: Callable[[int], None]) -> Iterator[None]:
    """Call ``act`` with 1, 2, … before each call by which this process changes a folder or syncs, and amid its writes.

    A kill counted in them hits what it is meant to hit, on a fast machine and a slow one. ``Path.write_bytes`` and
    ``write_text`` have written half by then; ``torch.save`` has not begun.
    """
    calls = 0

    def moment() -> None:
        nonlocal calls
        calls += 1
        act(calls)

    def before(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            moment()
            return original(*arguments, **options)

        return call

    def amid(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, data: Any, *arguments: Any, **options: Any) -> Any:
            original(path, data[: len(data) // 2], *arguments, **options)
            moment()
            return original(path, data, *arguments, **options)

        return call

    names = ("fsync", "link", "mkdir", "rename", "replace", "unlink", "rmdir")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(os, **{name: before(getattr(os, name)) for name in names}))
        stack.enter_context(mock.patch.object(torch, "save", before(torch.save)))
        for name in ("write_bytes", "write_text"):
            stack.enter_context(mock.patch.object(Path, name, amid(getattr(Path, name))))
        yield


def die() -> None:
    """SIGKILL, which leaves on the disk what is there at this moment."""
    os.kill(os.getpid(), signal.SIGKILL)
