"""Training with --torch_compile is training without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training.helpers import relative_change, trained

from ether_diffusion.training import setup

Train = Callable[..., Path]


def follow(train: Train, precision: str, checkpointing: bool, tolerance: float) -> None:
    common: dict[str, Any] = {"max_train_steps": 3, "mixed_precision": precision}
    eager = train("eager", **common)
    compiled = train("compiled", torch_compile=True, gradient_checkpointing=checkpointing, **common)
    start = train("start", **common | {"max_train_steps": 1, "learning_rate": 1e-12})
    moved = relative_change(trained(start, 1), trained(eager, 3))
    assert relative_change(trained(compiled, 3), trained(eager, 3)) < tolerance * moved


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_run_on_a_gpu_follows_the_eager_one(precision: str, checkpointing: bool, train: Train) -> None:
    follow(train, precision, checkpointing, 0.1 if precision == "bf16" else 0.02)


@pytest.mark.slow
def test_a_compiled_run_follows_the_eager_one(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with the compiler's own gradients, but without the code that it makes, whose gradients are wrong."""
    compiled, whole = [], nn.Module.compile
    monkeypatch.setattr(setup, "NOT_COMPILED_ON", ())

    def compile_traced(module: nn.Module) -> None:
        compiled.append(type(module).__name__)
        whole(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_traced)
    torch.compiler.reset()
    follow(train, "bf16", True, 0.02)
    torch.compiler.reset()
    assert set(compiled) == {"BasicTransformerBlock"}
