"""The hash of the base: the same through casts and fused adapters, another for other weights."""

from __future__ import annotations

import pytest
import torch
from helpers import shake
from peft import LoraConfig
from torch import nn

from ether_diffusion import attach
from ether_diffusion.core.host import host_of
from ether_diffusion.core.targets import find_targets
from ether_diffusion.pipelines.fingerprint import base_hash
from ether_diffusion.playground.tiny import tiny_pipeline, tiny_unet


@pytest.fixture
def unet() -> nn.Module:
    return tiny_pipeline().unet


def test_casting_keeps_the_hash(unet: nn.Module) -> None:
    expected = base_hash(unet)
    assert expected is not None
    assert len(expected) == 16
    assert int(expected, 16) > 0
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert base_hash(unet.to(dtype)) == expected


def test_underflow_to_zero_keeps_the_hash(unet: nn.Module) -> None:
    with torch.no_grad():
        for target in find_targets(unet):
            target.module.weight.mul_(1e-9)  # all of it vanishes in fp16, the signs do not
    expected = base_hash(unet)
    assert base_hash(unet.half()) == expected
    assert not find_targets(unet)[0].module.weight.any()


def test_the_same_seed_gives_the_same_hash_and_another_seed_another() -> None:
    hashes = [base_hash(tiny_pipeline(seed=seed).unet) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_a_small_change_of_the_weights_changes_the_hash(unet: nn.Module, size: float) -> None:
    """Finetuning moves weights by about a hundredth of their size; a thousandth is still seen here."""
    before = base_hash(unet)
    with torch.no_grad():
        for target in find_targets(unet):
            weight = target.module.weight
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std() * size)
    assert base_hash(unet) != before


def test_adapters_change_the_hash_neither_attached_nor_fused(unet: nn.Module) -> None:
    expected = base_hash(unet)
    adapter = attach(unet)
    shake(adapter)
    assert base_hash(unet) == expected
    host = host_of(unet)
    assert host is not None
    host.fuse()
    assert base_hash(unet) == expected
    host.unfuse()
    adapter.detach()
    assert base_hash(unet) == expected


def test_lora_beside_the_base_does_not_change_the_hash(unet: nn.Module) -> None:
    expected = base_hash(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]), "lora")
    assert base_hash(unet) == expected


def test_weights_that_cannot_be_read_have_no_hash(unet: nn.Module) -> None:
    with torch.device("meta"):
        assert base_hash(tiny_unet()) is None
    linear = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    assert base_hash(unet) is None
