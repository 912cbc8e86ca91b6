"""Torch's parts without a public name still mean what is taken from them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ether_diffusion.core.torch_private import in_function_transform, saves_through_hooks


def test_saved_tensors_go_through_hooks_within_a_checkpoint() -> None:
    seen: list[bool] = []

    def part(x: Tensor) -> Tensor:
        seen.append(saves_through_hooks())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    part(x)
    checkpoint(part, x, use_reentrant=False).sum().backward()
    assert seen == [False, True, True]  # and again where it is computed again
    checkpoint(part, x, use_reentrant=True).sum().backward()
    assert seen[3:] == [False, False]


def test_a_function_transform_is_known() -> None:
    seen: list[bool] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(in_function_transform())
        return x.square().sum()

    x = torch.ones(2)
    torch.func.grad(loss)(x)
    torch.func.vmap(loss)(torch.ones(3, 2))
    loss(x)
    assert seen == [True, True, False]
