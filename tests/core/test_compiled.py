"""Under torch.compile: nothing is traced again when adapters are switched, and nobody else's code is forgotten."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from helpers import shake
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ether_diffusion import EtherConfig, attach
from ether_diffusion.core.host import Host, host_of

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # as when a process begins
        yield
    torch.compiler.reset()


class Small(nn.Module):
    """A self- and a cross-attention, of diffusers' own class: a UNet takes minutes to compile."""

    def __init__(self) -> None:
        super().__init__()
        shape: dict[str, Any] = {"heads": 2, "dim_head": 8}
        self.blocks = nn.ModuleList([Attention(16, **shape), Attention(16, cross_attention_dim=12, **shape)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.blocks[0](x)
        return x + self.blocks[1](x, encoder_hidden_states=text)


def small() -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small().requires_grad_(False).eval()


def build(*kinds: str) -> tuple[Small, Host]:
    model = small()
    for seed, kind in enumerate(kinds or ("ether_plus",)):
        adapter = attach(model, EtherConfig(kind), "abcdef"[seed])
        shake(adapter, seed=seed + 1)
        adapter.requires_grad_(False)
    host = host_of(model)
    assert host is not None
    return model, host


def whole(model: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[return-value]


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend, fullgraph=True)
    return model


def parts(model: nn.Module, backend: Any) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend)
    return model


HOW = pytest.mark.parametrize("compiled", [whole, in_place, parts])
Compiled = Callable[[nn.Module, Any], nn.Module]


@torch.no_grad()
def run(model: nn.Module, seed: int = 3) -> Tensor:
    return model(*inputs(seed))


def inputs(seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 9, 16, generator=generator), torch.randn(2, 5, 12, generator=generator)


@HOW
def test_switching_adapters_and_strengths_traces_nothing_again(compiled: Compiled) -> None:
    base_model, host = build("ether_plus", "ether", "ether_plus")
    twin, other = build("ether_plus", "ether", "ether_plus")
    counter = CompileCounterWithBackend("aot_eager")
    model = compiled(base_model, counter)
    for strengths in ({"a": 1.0}, {"a": 1.0, "c": 0.6}):  # the warm-up: the largest mixture once
        host.set_active(strengths)
        run(model)
    warm = counter.frame_count
    switches: list[dict[str, float]] = [{name: 1.0} for name in "abcabc"]
    switches += [{"a": 0.05 * step} for step in range(20)] + [{"b": -0.3, "c": 1.7}, {"a": 0.2, "b": 0.9}, {}]
    for step, strengths in enumerate(switches):
        host.set_active(strengths)
        other.set_active(strengths)
        torch.testing.assert_close(run(model, step), run(twin, step), rtol=1e-4, atol=1e-5)
    for enabled in (False, True):
        host.enable(enabled)
        other.enable(enabled)
        torch.testing.assert_close(run(model), run(twin), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == warm


def test_a_larger_adapter_than_that_of_the_warm_up_traces_nothing_again() -> None:
    base_model, host = build("ether", "ether_plus")
    twin, other = build("ether", "ether_plus")
    counter = CompileCounterWithBackend("aot_eager")
    model = whole(base_model, counter)
    host.set_active({"a": 1.0})
    run(model)
    warm = counter.frame_count
    for each in (host, other):
        each.set_active({"b": 1.0})
    torch.testing.assert_close(run(model), run(twin), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == warm


@pytest.mark.parametrize("compiled", [whole, parts])
def test_compiled_code_follows_what_is_done_to_vectors_and_weights(compiled: Compiled) -> None:
    base_model, host = build("ether_plus", "naive")
    twin, other = build("ether_plus", "naive")
    model = compiled(base_model, "aot_eager")

    def check() -> None:
        torch.testing.assert_close(run(model), run(twin), rtol=1e-4, atol=1e-5)

    host.set_active({"a": 1.0})
    other.set_active({"a": 1.0})
    check()
    for each in (host, other):
        state = {key: value.flip(-1) for key, value in each.adapters["a"].state_dict().items()}
        each.adapters["a"].load_state_dict(state)
    check()
    for each in (host, other):
        each.fuse()
    check()
    for each in (host, other):
        each.unfuse()
    check()
    for each in (host, other):
        each.set_active({"a": 0.5, "b": 1.0})  # blocks of Naive are not thin
    check()
    for each in (host, other):
        each.set_per_sample(["a", None])
    check()
    for each in (host, other):
        each.set_active({"a": 1.0})
        each.adapters["a"].requires_grad_()
    check()
    for each in (host, other):
        shake(each.adapters["a"], seed=9)  # as an optimiser does
    check()
    for each in (host, other):
        each.adapters["a"].requires_grad_(False)
    check()
    for each in (base_model, twin):
        each.double()
        each.float()
    check()


def test_compiled_parts_see_vectors_and_weights_that_others_change() -> None:
    base_model, host = build()
    twin, other = build()
    model = parts(base_model, "aot_eager")
    torch.testing.assert_close(run(model), run(twin), rtol=1e-4, atol=1e-5)
    for each in (host, other):
        shake(each.adapters["a"], seed=9)
    torch.testing.assert_close(run(model), run(twin), rtol=1e-4, atol=1e-5)
    for each in (base_model, twin):
        with torch.no_grad():
            each.blocks[0].to_q.weight.mul_(1.5)
    torch.testing.assert_close(run(model), run(twin), rtol=1e-4, atol=1e-5)


def test_gradients_of_a_compiled_base_model_are_those_of_the_eager_one() -> None:
    base_model, host = build("ether_plus", "ether")
    twin, other = build("ether_plus", "ether")
    model = whole(base_model, "aot_eager")
    for strengths in ({"a": 1.0}, {"b": 1.0}):
        found = []
        for each, run_with in ((host, model), (other, twin)):
            each.set_active(strengths)
            (name,) = strengths
            adapter = each.adapters[name].requires_grad_()
            run(run_with)  # as at a validation
            adapter.zero_grad()
            run_with(*inputs()).square().mean().backward()
            found.append([p.grad for p in adapter.parameters()])
            adapter.requires_grad_(False)
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-7)


@HOW
def test_attaching_to_a_compiled_base_model_is_seen_and_leaves_other_models_alone(compiled: Compiled) -> None:
    base_model = small()
    counter = CompileCounterWithBackend("eager")
    stranger = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend=counter)
    x = torch.randn(2, 8)
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # as after the first adapter of a process
    stranger(x)
    model, twin = compiled(base_model, "aot_eager"), copy.deepcopy(base_model)
    base = run(model)
    for each in (base_model, twin):
        shake(attach(each, EtherConfig(targets=("blocks.0.to_q",)), "a"), seed=1)
    adapted = run(model)
    assert (adapted - base).abs().max() > 1e-3
    torch.testing.assert_close(adapted, run(twin), rtol=1e-4, atol=1e-5)
    for each in (base_model, twin):
        shake(attach(each, EtherConfig("ether", targets=("blocks.1.to_v",)), "b"), seed=2)
    torch.testing.assert_close(run(model), run(twin), rtol=1e-4, atol=1e-5)
    for name in ("a", "b"):
        host = host_of(base_model)
        assert host is not None
        host.adapters[name].detach()
    torch.testing.assert_close(run(model), base, rtol=1e-5, atol=1e-6)
    stranger(x)
    assert counter.frame_count == 1


@HOW
def test_the_first_adapter_of_a_process_finds_the_model_compiled(compiled: Compiled) -> None:
    base_model = small()
    counter = CompileCounterWithBackend("eager")
    stranger = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend=counter)
    stranger(torch.randn(2, 8))
    model = compiled(base_model, "aot_eager")
    twin = copy.deepcopy(base_model)
    base = run(model)
    for each in (base_model, twin):
        shake(attach(each), seed=1)
    adapted = run(model)
    assert (adapted - base).abs().max() > 1e-3
    torch.testing.assert_close(adapted, run(twin), rtol=1e-4, atol=1e-5)
    stranger(torch.randn(2, 8))
    assert counter.frame_count == 1


class Stack(nn.Module):
    """Blocks of one kind, which are compiled one by one (``compile_repeated_blocks``)."""

    def __init__(self, blocks: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(16, heads=2, dim_head=8) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("kind", ["ether", "ether_plus", "naive", "anchored"])
@pytest.mark.parametrize("trained", [False, True], ids=["drawing", "training"])
def test_blocks_of_one_kind_share_one_compiled_code(kind: str, trained: bool) -> None:
    """More blocks than the compiler takes of one function (``recompile_limit``) before it runs them eagerly."""
    torch.manual_seed(0)
    model = Stack().requires_grad_(False)
    assert len(model.blocks) > torch._dynamo.config.recompile_limit
    shake(attach(model, EtherConfig(kind), "a").requires_grad_(trained), seed=1)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    x = torch.randn(2, 9, 16, requires_grad=trained)  # as in training, where all but the first block see gradients
    found = []
    for each in (model, twin):
        with torch.set_grad_enabled(trained):
            output = each(x)
        if trained:
            output.square().mean().backward()
        host = host_of(each)
        assert host is not None
        found.append([output, *(p.grad for p in host.adapters["a"].parameters() if trained)])
    assert counter.frame_count == 1
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_blocks_share_their_code_whatever_acts_and_after_layers_are_replaced() -> None:
    torch.manual_seed(0)
    model = Stack().requires_grad_(False)
    for seed, name in enumerate("ab"):
        shake(attach(model, name=name).requires_grad_(False), seed=seed + 1)
    counter = CompileCounterWithBackend("aot_eager")
    twin = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend=counter)
    x = torch.randn(2, 9, 16)
    hosts = [host for each in (model, twin) if (host := host_of(each)) is not None]
    for strengths in ({"a": 0.3, "b": 0.6}, {"a": 1.0}, {"b": 0.4}, {}):
        for host in hosts:
            host.set_active(strengths)
        with torch.no_grad():
            torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    for each in (model, twin):
        torch.manual_seed(1)
        each.blocks[3].to_q = nn.Linear(16, 16, bias=False).requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
