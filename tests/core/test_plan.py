"""What acts is decided once and immutable: parts called alone, checkpoints, switches, threads, copies, other hooks."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import DIRECT, dense_weight, shake, unet_inputs, vectors_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from ether_diffusion import Adapter, EtherConfig, attach
from ether_diffusion.core.host import Host, host_of
from ether_diffusion.core.linear import Projection
from ether_diffusion.core.switches import SwitchedError
from ether_diffusion.core.targets import find_targets
from ether_diffusion.playground.tiny import tiny_unet

ROUNDS = int(os.environ.get("ETHER_THREAD_ROUNDS", "12"))
"""Forwards of each thread; by hand 200."""
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


def build(*names: str, double: bool = False) -> tuple[UNet2DConditionModel, Host]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = tiny_unet().requires_grad_(False).eval()
    for seed, name in enumerate(names):
        shake(attach(unet, name=name), seed=seed + 1)
    host = host_of(unet)
    assert host is not None
    if double:
        unet.double()
        for adapter in host.adapters.values():
            adapter.double()
    return unet, host


def run(unet: nn.Module, seed: int = 0, batch: int = 2) -> Tensor:
    given = {k: v.to(unet.dtype) if v.is_floating_point() else v for k, v in unet_inputs(seed, batch=batch).items()}
    return unet(**given).sample


def norms(adapter: Adapter) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    return found


def close(first: list[Tensor], second: list[Tensor], rtol: float = 1e-9) -> None:
    for got, want in zip(first, second, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12)


@REENTRANT
def test_a_part_under_a_checkpoint_uses_the_vectors_of_its_own_forward(reentrant: bool) -> None:
    unet, host = build("a", double=True)
    adapter = host.adapters["a"]
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    x = torch.randn(2, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    text = torch.randn(2, 4, unet.config.cross_attention_dim, dtype=torch.float64)

    def loss(checkpointed: bool) -> Tensor:
        def part(hidden: Tensor) -> Tensor:
            return block(hidden, encoder_hidden_states=text)

        return (checkpoint(part, x, use_reentrant=reentrant) if checkpointed else part(x)).square().sum()

    run(unet).square().mean().backward()  # rows of a forward of the whole model
    norms(adapter)
    shake(adapter, seed=7)  # a step
    loss(False).backward()
    expected = norms(adapter)
    loss(True).backward()
    close(norms(adapter), expected)


def checkpointed(unet: UNet2DConditionModel, reentrant: bool) -> None:
    unet.train()
    unet.enable_gradient_checkpointing(
        lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=reentrant)
    )


def given(unet: nn.Module) -> dict[str, Any]:
    found = unet_inputs()
    found["sample"].requires_grad_()  # a reentrant checkpoint needs an input that does
    return found


@REENTRANT
@pytest.mark.parametrize(
    "switch",
    [
        lambda host: host.set_active({"b": 1.0}),
        lambda host: host.set_active({"a": 0.5}),
        lambda host: host.enable(False),
        lambda host: host.set_per_sample(["a", "b"]),
    ],
    ids=["another", "strength", "off", "per sample"],
)
def test_a_switch_before_a_backward_that_computes_again_is_an_error(
    switch: Callable[[Host], None], reentrant: bool
) -> None:
    unet, host = build("a", "b")
    host.set_active({"a": 1.0})
    checkpointed(unet, reentrant)
    loss = unet(**given(unet)).sample.square().mean()
    switch(host)
    with pytest.raises(SwitchedError, match=r"switched between the forward and the backward.*call backward before"):
        loss.backward()
    host.set_active({"a": 1.0})
    host.enable()
    unet(**given(unet)).sample.square().mean().backward()  # and all is well again
    assert all(p.grad is not None for p in host.adapters["a"].parameters())


def test_a_switch_within_a_users_own_checkpoint_is_an_error_too() -> None:
    unet, host = build("a", "b")
    host.set_active({"a": 1.0})
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2, 9, 64, requires_grad=True)
    loss = checkpoint(attention, x, use_reentrant=False).square().sum()
    host.set_active({"b": 1.0})
    with pytest.raises(SwitchedError, match="attn1"):
        loss.backward()


@REENTRANT
def test_adapters_may_be_off_between_a_forward_and_its_backward(reentrant: bool) -> None:
    """As in preference training: the policy's forward, the reference's without the adapter, then the backward."""
    unet, host = build("a")
    run(unet, 3).square().mean().backward()
    expected = norms(host.adapters["a"])
    checkpointed(unet, reentrant)
    loss = unet(**given(unet)).sample.square().mean()
    host.enable(False)
    with torch.no_grad():
        run(unet, 1)
    host.enable()
    loss.backward()
    close(norms(host.adapters["a"]), expected, rtol=1e-4)


def test_without_checkpoints_adapters_may_be_switched_between_forwards() -> None:
    unet, host = build("a", "b", double=True)
    wanted = []
    for name, seed in (("a", 1), ("b", 2)):
        host.set_active({name: 1.0})
        run(unet, seed).square().mean().backward()
        wanted.append(norms(host.adapters[name]))
    host.set_active({"a": 1.0})
    first = run(unet, 1).square().mean()
    host.set_active({"b": 1.0})
    (first + run(unet, 2).square().mean()).backward()
    close(norms(host.adapters["a"]), wanted[0])
    close(norms(host.adapters["b"]), wanted[1])


def test_threads_that_share_models_get_the_same_as_one_after_the_other() -> None:
    """Pipelines with different adapters that share the base's weights: one, a mixture, one for each sample, none."""
    base, _ = build("a", "b")
    shared = {id(parameter): parameter for parameter in base.parameters()}
    unets: list[UNet2DConditionModel] = []
    for strengths in ({"a": 1.0}, {"a": 0.7, "b": 0.4}, {"b": -0.6}, {}, None):
        unet = copy.deepcopy(base, dict(shared))
        host = host_of(unet)
        assert host is not None
        if strengths is None:
            host.set_per_sample(["a"])
        else:
            host.set_active(strengths)
        unets.append(unet)
    keys = [(number, seed, batch) for number in range(len(unets)) for seed in range(2) for batch in (1, 2, 3)]

    def draw(key: tuple[int, int, int]) -> Tensor:
        number, seed, batch = key
        with torch.no_grad():
            return run(unets[number], seed, batch)

    expected = {key: draw(key) for key in keys}
    assert len({round(float(picture.abs().sum()), 3) for picture in expected.values()}) >= len(keys) - 6  # "a" twice

    def serve(thread: int) -> int:
        chosen = [keys[(thread + (thread + 1) * turn) % len(keys)] for turn in range(ROUNDS)]
        return sum(not torch.allclose(draw(key), expected[key], atol=1e-6) for key in chosen)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(serve, range(8))) == 0


@REENTRANT
def test_a_backward_in_another_thread_computes_again_rightly(reentrant: bool) -> None:
    unet, host = build("a")
    run(unet, 3).square().mean().backward()
    expected = norms(host.adapters["a"])
    checkpointed(unet, reentrant)
    loss = unet(**given(unet)).sample.square().mean()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    close(norms(host.adapters["a"]), expected, rtol=1e-4)


def test_a_copy_of_an_adapter_is_its_vectors_and_not_the_model() -> None:
    unet, host = build("a")
    adapter = host.adapters["a"]
    twin = copy.deepcopy(adapter)
    assert twin.host is None
    assert adapter.host is host
    assert sum(p.numel() for p in AveragedModel(adapter).parameters()) == adapter.num_parameters()
    assert len(pickle.dumps(adapter)) < 8 * adapter.num_parameters() + 100_000
    copied = copy.deepcopy(unet)
    copied_host = host_of(copied)
    assert copied_host is not None
    assert copied_host.adapters["a"].host is copied_host
    copied_host.adapters["a"].detach()
    assert host_of(copied) is None
    assert host_of(unet) is host


def test_an_exception_in_a_projection_keeps_nothing_alive() -> None:
    unet, _ = build("a")
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    kept: list[weakref.ref[Tensor]] = []

    def fail(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(weakref.ref(args[0]))
        raise MemoryError("out of memory")

    handle = attention.to_q.register_forward_pre_hook(fail)
    x = torch.randn(2, 200, 64, requires_grad=True)
    with pytest.raises(MemoryError):
        attention(x * 2)
    handle.remove()
    gc.collect()
    assert [each() for each in kept] == [None]


def one_linear(config: EtherConfig, bias: bool = True) -> tuple[nn.ModuleDict, Adapter]:
    torch.manual_seed(3)
    model = nn.ModuleDict({"proj": nn.Linear(16, 24, bias=bias).requires_grad_(False)})
    adapter = attach(model, EtherConfig(**{**config.to_dict(), "targets": ("proj",)}))
    shake(adapter)
    return model, adapter


def dense(model: nn.ModuleDict, adapter: Adapter, x: Tensor) -> Tensor:
    weight = dense_weight(model["proj"].weight, vectors_of(adapter, "proj"))
    return x.double() @ weight.T + model["proj"].bias.double()


KINDS = {"ether": EtherConfig("ether"), "ether_plus": EtherConfig(), "naive": EtherConfig("naive")}
KIND = pytest.mark.parametrize("kind", KINDS)
COUNT = pytest.mark.parametrize("count", [2, 60], ids=["few tokens", "many tokens"])


@KIND
@COUNT
def test_the_input_may_be_given_by_name(kind: str, count: int) -> None:
    model, adapter = one_linear(KINDS[kind])
    x = torch.randn(count, 16)
    torch.testing.assert_close(model["proj"](input=x), model["proj"](x), rtol=0, atol=0)
    torch.testing.assert_close(model["proj"](x).double(), dense(model, adapter, x), rtol=1e-5, atol=1e-5)


@KIND
@COUNT
def test_hooks_of_others_see_inputs_and_gradients_and_keep_their_outputs(kind: str, count: int) -> None:
    model, adapter = one_linear(KINDS[kind])
    x = torch.randn(count, 16, requires_grad=True)
    expected = model["proj"](x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    seen: list[Any] = []
    model["proj"].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append((grad_in[0], grad_out[0])))
    model["proj"](x).square().sum().backward()
    assert seen[0][0] is not None
    torch.testing.assert_close(x.grad, wanted)
    outputs: list[Tensor] = []
    later = nn.Linear(16, 24).requires_grad_(False)
    later.load_state_dict(model["proj"].state_dict())
    later.register_forward_hook(lambda module, args, output: outputs.append(output))
    plain = later(x.detach()).clone()
    other = attach(nn.ModuleDict({"proj": later}), EtherConfig(**{**KINDS[kind].to_dict(), "targets": ("proj",)}))
    other.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(later(x.detach()), expected.detach())
    if count == 60 and kind != "naive":
        assert torch.equal(outputs[-1], plain)  # the update of low rank is not written into what they keep


@KIND
@COUNT
def test_function_transforms_give_the_gradients_of_autograd(kind: str, count: int) -> None:
    model, adapter = one_linear(KINDS[kind])
    x = torch.randn(count, 16, dtype=torch.float64)
    model.double()
    adapter.double()

    def loss(x: Tensor) -> Tensor:
        return model["proj"](x).square().sum()

    y = x.clone().requires_grad_()
    loss(y).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), y.grad)
    batch = torch.stack([x, 2 * x])
    one_by_one = torch.stack([model["proj"](each) for each in batch])
    torch.testing.assert_close(torch.func.vmap(model["proj"])(batch), one_by_one)


def test_models_may_have_children_of_any_name() -> None:
    model = nn.ModuleDict({"config": nn.Linear(8, 8), "host": nn.Linear(8, 8), "methods": nn.Linear(8, 8)})
    adapter = attach(model, EtherConfig(targets=("config", "host", "methods")))
    assert set(adapter.methods()) == {"config", "host", "methods"}
    assert adapter.config.method == "ether_plus"
    assert len(adapter.state_dict()) == 12


@pytest.mark.parametrize("change", [lambda a: a.to(torch.bfloat16), lambda a: a.half()])
def test_vectors_stay_fp32(change: Callable[[Adapter], Any]) -> None:
    _, host = build("a")
    adapter = host.adapters["a"]
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    change(adapter)
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


def test_wrappers_do_not_change_keys_and_the_adapter_acts_through_them() -> None:
    plain, _ = build("a")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = tiny_unet().requires_grad_(False).eval()
    unet.mid_block = torch.compile(unet.mid_block, backend="eager")
    adapter = attach(nn.DataParallel(unet), name="a")
    shake(adapter, seed=1)
    host = host_of(plain)
    assert host is not None
    assert adapter.state_dict().keys() == host.adapters["a"].state_dict().keys()
    torch.testing.assert_close(run(unet), run(plain))


class Stored8Bit(nn.Module):
    """A quantised stand-in, as a library puts it in the place of a Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.abs().amax() / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_the_adapter_follows_to_what_takes_a_projections_place() -> None:
    unet, host = build("a")
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    with torch.no_grad():
        expected = run(unet)
        host.enable(False)
        base = run(unet)
        host.enable()
        for name in ("to_q", "to_k", "to_v"):
            setattr(attention, name, Stored8Bit(getattr(attention, name)))
        changed = run(unet)
    assert (changed - expected).abs().max() < 0.05 * (expected - base).abs().max()
    replaced = nn.Linear(64, 64)
    attention.to_v = replaced
    run(unet)
    assert len(replaced._forward_hooks) == 1
    attention.to_v = nn.Linear(64, 32)
    with pytest.raises(RuntimeError, match=r"the projection mid_block.*attn1.to_v was replaced by Linear.*unload"):
        run(unet)
    with pytest.raises(RuntimeError, match="was replaced"):
        host.fuse()


@pytest.mark.parametrize("strengths", [{"a": 0.7}, {"a": 1.0, "b": 1.0}, {"a": 0.6, "b": -0.3}])
@COUNT
def test_mixtures_are_the_dense_sum_with_their_gradients(strengths: dict[str, float], count: int) -> None:
    torch.manual_seed(3)
    model = nn.ModuleDict({"proj": nn.Linear(16, 24).requires_grad_(False)}).double()
    adapters = {}
    for seed, name in enumerate("ab"):
        adapters[name] = attach(model, EtherConfig(targets=("proj",)), name).double()
        shake(adapters[name], seed=seed)
    host = host_of(model)
    assert host is not None
    host.set_active(strengths)
    x = torch.randn(count, 16, dtype=torch.float64, requires_grad=True)
    weight = model["proj"].weight
    moved = {name: dense_weight(weight, vectors_of(adapters[name], "proj")) - weight for name in strengths}
    total = weight + sum(s * moved[name] for name, s in strengths.items())
    expected, output = x @ total.T + model["proj"].bias, model["proj"](x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-11)
    inputs = [x, *(p for name in strengths for p in adapters[name].parameters())]
    upstream = torch.randn_like(output)
    found, wanted = (torch.autograd.grad(each, inputs, upstream) for each in (output, expected))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_mixtures_work_in_half_precision_as_one_adapter_does() -> None:
    torch.manual_seed(3)
    model = nn.ModuleDict({"proj": nn.Linear(64, 64).requires_grad_(False)})
    adapters = [attach(model, EtherConfig(targets=("proj",)), name) for name in "ab"]
    for seed, adapter in enumerate(adapters):
        shake(adapter, seed=seed)
    x = torch.randn(300, 64)
    host = host_of(model)
    assert host is not None
    host.set_active({"a": 0.5, "b": 0.7})
    weight = model["proj"].weight.bfloat16().float()
    total = weight.double()
    for adapter, strength in zip(adapters, (0.5, 0.7), strict=True):
        total = total + strength * (dense_weight(weight, vectors_of(adapter, "proj")) - weight.double())
    model.bfloat16()
    expected = x.bfloat16().double() @ total.T + model["proj"].bias.double()
    output = model["proj"](x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).abs().max() / expected.abs().max() < DIRECT[torch.bfloat16]


def test_the_models_own_checkpoints_count_in_eval_mode_too() -> None:
    unet, host = build("a", "b")
    host.set_active({"a": 1.0})
    checkpointed(unet, False)
    unet.eval()  # diffusers goes by the switch alone
    loss = unet(**given(unet)).sample.square().mean()
    host.set_active({"b": 1.0})
    with pytest.raises(SwitchedError):
        loss.backward()


def test_zero_strengths_and_the_order_of_names_are_no_switch() -> None:
    unet, host = build("a", "b")
    host.set_active({"a": 1.0, "b": 0.5})
    checkpointed(unet, False)
    loss = unet(**given(unet)).sample.square().mean()
    shake(attach(unet, name="c"), seed=5)
    host.set_active({"c": 0.0, "b": 0.5, "a": 1.0})
    loss.backward()
    assert all(p.grad is not None for p in host.adapters["a"].parameters())


def test_vectors_that_change_before_the_backward_are_an_error() -> None:
    model, adapter = one_linear(EtherConfig())
    loss = model["proj"](torch.randn(2, 16)).square().sum()
    shake(adapter, seed=9)
    with pytest.raises(RuntimeError, match="vectors of an adapter were changed between its forward and its backward"):
        loss.backward()


class Squashed(nn.Linear):
    """A projection whose backward needs its own output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def test_an_output_that_the_projection_itself_keeps_is_not_changed_under_a_checkpoint() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": Squashed(8, 8)}).requires_grad_(False)
    shake(attach(model, EtherConfig("ether", targets=("proj",))))
    x = torch.randn(3, 8, requires_grad=True)
    checkpoint(lambda y: model["proj"](y).mul_(2).square(), x, use_reentrant=False).sum().backward()
    (expected,) = torch.autograd.grad((2 * model["proj"](x)).square().sum(), x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


@COUNT
def test_what_follows_a_projection_may_work_in_place_under_a_checkpoint(count: int) -> None:
    model, adapter = one_linear(EtherConfig(two_sided=False))
    x = torch.randn(count, 16, requires_grad=True)
    torch.relu(model["proj"](x)).sum().backward()
    expected = norms(adapter)
    checkpoint(lambda y: torch.relu_(model["proj"](y)), x, use_reentrant=False).sum().backward()
    close(norms(adapter), expected, rtol=1e-5)


def test_global_hooks_keep_what_they_saw_and_the_gradients_of_what_they_did() -> None:
    model, _ = one_linear(EtherConfig())
    x, scale, seen = torch.randn(60, 16), torch.tensor(2.0, requires_grad=True), []

    def double(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        if module is not model["proj"]:
            return None
        seen.append((output, output.clone()))
        return output * scale

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        model["proj"](x).sum().backward()
    finally:
        handle.remove()
    assert torch.equal(*seen[0])
    assert scale.grad is not None
    assert scale.grad.abs() > 0


def test_a_later_hook_of_others_does_not_make_the_adapter_act_twice() -> None:
    torch.manual_seed(3)
    model = nn.ModuleDict({"proj": nn.Linear(64, 64).requires_grad_(False)})
    adapter = attach(model, EtherConfig(targets=("proj",)))
    shake(adapter)
    weight = model["proj"].weight.bfloat16()
    expected = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    model.bfloat16()
    x = expected.clone()
    expected = x.double() @ dense_weight(weight, vectors_of(adapter, "proj")).T + model["proj"].bias.double()
    model["proj"].register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    found = model["proj"](x).double()
    assert (found - expected).abs().max() / expected.abs().max() < DIRECT[torch.bfloat16]


def test_shared_weights_are_not_fused_twice() -> None:
    model = nn.ModuleDict({"first": nn.Linear(16, 16, bias=False), "second": nn.Linear(16, 16, bias=False)})
    model["second"].weight = model["first"].weight
    model.requires_grad_(False)
    shake(attach(model, EtherConfig(targets=("first", "second"))))
    before = model["first"].weight.clone()
    host = host_of(model)
    assert host is not None
    with pytest.raises(ValueError, match="first and second share one weight"):
        host.fuse()
    assert torch.equal(model["first"].weight, before)


def test_an_interrupted_fuse_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, host = build("a")
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    fuse, calls = Projection.fuse, []

    def interrupted(projection: Projection) -> None:
        calls.append(projection.path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        fuse(projection)

    monkeypatch.setattr(Projection, "fuse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        host.fuse()
    assert not host.fused
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_vectors_may_change_while_they_are_fused() -> None:
    unet, host = build("a")
    host.fuse()
    shake(host.adapters["a"], seed=9)
    host.unfuse()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = tiny_unet().state_dict()
    assert all(torch.equal(value, base[key]) for key, value in unet.state_dict().items())


def test_every_projection_has_its_plan_and_nothing_else_that_changes() -> None:
    unet, host = build("a", "b")
    before = {path: dict(vars(projection)) for path, projection in host._projections.items()}
    run(unet)
    assert {path: dict(vars(projection)) for path, projection in host._projections.items()} == before
    host.set_active({"b": 0.5})
    assert all(projection.plan is not before[path]["plan"] for path, projection in host._projections.items())
    assert len(before) == len(find_targets(unet))
