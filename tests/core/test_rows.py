"""Rows made once per forward are right wherever the parts of a model run again, alone, or after a change."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import shake, unet_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ether_diffusion import Adapter, attach
from ether_diffusion.core import linear, rows
from ether_diffusion.core.host import host_of
from ether_diffusion.core.methods import Sides
from ether_diffusion.core.targets import find_targets
from ether_diffusion.playground.tiny import tiny_unet


def adapted() -> tuple[UNet2DConditionModel, Adapter]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = tiny_unet().requires_grad_(False).eval()
    adapter = attach(unet)
    shake(adapter)
    return unet, adapter


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Within it every projection makes its own rows: the plain path, which the shared one must equal."""
    with monkeypatch.context() as patch:
        patch.setattr(linear, "rows_of", lambda host, slot: None)
        yield patch


def loss(unet: UNet2DConditionModel, seed: int = 3) -> Tensor:
    return unet(**unet_inputs(seed)).sample.square().mean()


def gradients(adapter: Adapter) -> list[Tensor]:
    found = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    assert len(found) == len(list(adapter.parameters()))
    adapter.zero_grad()
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_plain_path_gives_the_same_bits(alone: pytest.MonkeyPatch) -> None:
    unet, adapter = adapted()
    expected = loss(unet)
    expected.backward()
    wanted = gradients(adapter)
    alone.undo()
    found = loss(unet)
    found.backward()
    assert torch.equal(found, expected)
    assert same(gradients(adapter), wanted)


def test_rows_are_used_within_the_forward_and_gone_after_it_without_gradients() -> None:
    unet, _ = adapted()
    seen = []
    host = host_of(unet)
    assert host is not None
    unet.mid_block.register_forward_hook(lambda *_: seen.append([len(each.rows) for each in rows._RUNNING.get()]))
    with torch.no_grad():
        loss(unet)
    assert seen == [[len(find_targets(unet))]]
    assert rows._RUNNING.get() == ()


def test_a_projection_makes_rows_only_where_no_forward_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = adapted()
    made = []

    def counted(slot: rows.Slot) -> Sides:
        made.append(slot)
        return rows.own_rows(slot)

    monkeypatch.setattr(linear, "own_rows", counted)
    loss(unet)
    assert made == []
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q(torch.ones(1, 5, 64))
    assert len(made) == 1


def test_forwards_may_pile_up_before_their_backwards() -> None:
    unet, adapter = adapted()
    (loss(unet, 1) + 2 * loss(unet, 2)).backward()
    together = gradients(adapter)
    loss(unet, 1).backward()
    (2 * loss(unet, 2)).backward()
    for got, want in zip(together, gradients(adapter), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_writing_into_parameters_unseen_changes_the_next_forward() -> None:
    """Some optimisers write through ``.data``, which no version counter sees."""
    unet, adapter = adapted()
    before = loss(unet)
    for parameter in adapter.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    changed = loss(unet)
    assert abs(changed - before) > 1e-4
    twin, other = adapted()
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(loss(twin), changed)


def test_a_part_called_alone_after_a_step_uses_the_new_vectors() -> None:
    unet, adapter = adapted()
    part = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    loss(unet).backward()
    before = part(x)
    shake(adapter, seed=9)
    after = part(x)
    assert (after - before).abs().max() > 1e-3
    loss(unet)
    assert torch.equal(part(x), after)


def test_a_forward_that_failed_leaves_no_rows_behind() -> None:
    unet, adapter = adapted()
    part = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))

    def fail(*_: object) -> None:
        raise MemoryError("out of memory")

    handle = unet.conv_out.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        loss(unet)
    handle.remove()
    before = part(x)
    shake(adapter, seed=9)
    assert (part(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_checkpointing_give_the_same_gradients(reentrant: bool) -> None:
    unet, adapter = adapted()
    loss(unet).backward()
    expected = gradients(adapter)
    unet.train()
    unet.enable_gradient_checkpointing(
        lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=reentrant)
    )
    sample = unet_inputs()
    sample["sample"].requires_grad_()  # a reentrant checkpoint needs an input that does
    unet(**sample).sample.square().mean().backward()
    for got, want in zip(gradients(adapter), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_a_copy_taken_after_a_training_step_has_rows_of_its_own() -> None:
    unet, adapter = adapted()
    expected = loss(unet)
    twin = copy.deepcopy(unet)
    shake(adapter, seed=9)
    changed = loss(unet)
    assert torch.equal(loss(twin), expected)
    host = host_of(twin)
    assert host is not None
    host.adapters["default"].detach()
    assert torch.equal(loss(unet), changed)
