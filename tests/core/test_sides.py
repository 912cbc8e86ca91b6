"""Both sides around a frozen projection in one function, as a GPU takes it: outputs, gradients, what is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel
from helpers import DIRECT, dense_weight, relative_error, shake, unet_inputs, vectors_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ether_diffusion import Adapter, EtherConfig, attach
from ether_diffusion.core import linear
from ether_diffusion.core.host import host_of
from ether_diffusion.core.targets import find_targets
from ether_diffusion.evaluation.paper.blocks import kept_bytes
from ether_diffusion.playground.tiny import tiny_unet

IN, OUT, SAMPLES, TOKENS = 24, 40, 3, 7
CONFIGS = {
    "ether": EtherConfig("ether", targets=("proj",)),
    "ether_plus": EtherConfig(targets=("proj",)),
    "anchored": EtherConfig("anchored", targets=("proj",)),
    "one-sided": EtherConfig(two_sided=False, targets=("proj",)),
}
KIND = pytest.mark.parametrize("kind", CONFIGS)
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


@pytest.fixture(params=["nothing kept", "output kept"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a CPU: the way of a GPU, and that of a CPU with few tokens."""
    monkeypatch.setattr(linear, "many_tokens", lambda *_: False)
    if request.param == "nothing kept":
        monkeypatch.setattr(linear, "keeps_output", lambda *_: False)
    return


def one(kind: str, bias: bool, dtype: torch.dtype = torch.float64, *names: str) -> tuple[nn.ModuleDict, list[Adapter]]:
    torch.manual_seed(3)
    model = nn.ModuleDict({"proj": nn.Linear(IN, OUT, bias=bias).requires_grad_(False)}).to(dtype)
    adapters = [attach(model, CONFIGS[kind], name) for name in names or ("a",)]
    for seed, adapter in enumerate(adapters):
        shake(adapter, seed=seed)
        if dtype == torch.float64:
            adapter.double()
    return model, adapters


def dense(model: nn.ModuleDict, adapter: Adapter) -> Tensor:
    return dense_weight(model["proj"].weight, vectors_of(adapter, "proj"))


def with_bias(model: nn.ModuleDict, y: Tensor) -> Tensor:
    return y if model["proj"].bias is None else y + model["proj"].bias.double()


def same_gradients(output: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-11)
    upstream = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(5))
    found, wanted = (torch.autograd.grad(each, inputs, upstream) for each in (output, expected))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@KIND
@BIAS
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_outputs_and_gradients_are_those_of_the_dense_weight(kind: str, bias: bool, layout: str) -> None:
    model, (adapter,) = one(kind, bias)
    x = torch.randn(SAMPLES, TOKENS, IN, dtype=torch.float64)
    x = (x if layout == "contiguous" else x.mT.contiguous().mT).requires_grad_()
    same_gradients(model["proj"](x), with_bias(model, x @ dense(model, adapter).mT), [x, *adapter.parameters()])


@KIND
@BIAS
def test_second_derivatives(kind: str, bias: bool) -> None:
    model, (adapter,) = one(kind, bias)
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *_: model["proj"](x), [x, *adapter.parameters()], atol=1e-6)


@KIND
@BIAS
@pytest.mark.parametrize("frozen", ["input", "vectors"])
def test_what_needs_no_gradient_gets_none(kind: str, bias: bool, frozen: str) -> None:
    model, (adapter,) = one(kind, bias)
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=frozen != "input")
    adapter.requires_grad_(frozen != "vectors")
    inputs = [x] if frozen == "vectors" else list(adapter.parameters())
    same_gradients(model["proj"](x), with_bias(model, x @ dense(model, adapter).mT), inputs)
    if frozen == "vectors":  # and twice: of a function that does not depend on x
        (first,) = torch.autograd.grad(model["proj"](x).square().sum(), x, create_graph=True)
        (twice,) = torch.autograd.grad(first.sum(), x)
        weight = dense(model, adapter)
        torch.testing.assert_close(twice, (2 * weight.mT @ weight).sum(0).expand(TOKENS, IN), rtol=1e-9, atol=1e-10)


@KIND
@BIAS
def test_each_sample_may_have_vectors_of_its_own(kind: str, bias: bool) -> None:
    model, adapters = one(kind, bias, torch.float64, "a", "b")
    host = host_of(model)
    assert host is not None
    host.set_per_sample(["b", None, "a"])
    x = torch.randn(SAMPLES, TOKENS, IN, dtype=torch.float64, requires_grad=True)
    weights = [dense(model, adapters[1]), model["proj"].weight, dense(model, adapters[0])]
    expected = torch.stack([each @ weight.mT for each, weight in zip(x, weights, strict=True)])
    inputs = [x, *adapters[0].parameters(), *adapters[1].parameters()]
    same_gradients(model["proj"](x), with_bias(model, expected), inputs)


@KIND
@BIAS
def test_half_precision_loses_no_more_than_one_rounding_of_it(kind: str, bias: bool) -> None:
    model, (adapter,) = one(kind, bias, torch.bfloat16)
    if bias:
        model["proj"].bias.data += 30  # a sum over tokens with and without it would cancel
    x = torch.randn(SAMPLES, TOKENS, IN, dtype=torch.bfloat16, requires_grad=True)
    y = x.detach().double().requires_grad_()
    vectors = {key: value.detach().double().requires_grad_() for key, value in vectors_of(adapter, "proj").items()}
    expected = y @ dense_weight(model["proj"].weight, vectors).mT
    output = model["proj"](x)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, with_bias(model, expected)) < DIRECT[torch.bfloat16]
    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream.double())
    assert x.grad is not None
    assert relative_error(x.grad, y.grad) < 2 * DIRECT[torch.bfloat16]
    for key, vector in adapter.methods()["proj"].named_parameters():
        assert vector.grad is not None
        found, wanted = vector.grad.double(), vectors[key].grad
        assert (found - wanted).norm() < 4 * DIRECT[torch.bfloat16] * wanted.norm(), key


@KIND
def test_without_gradients_the_output_is_the_same(kind: str) -> None:
    model, _ = one(kind, bias=True)
    x = torch.randn(TOKENS, IN, dtype=torch.float64)
    expected = model["proj"](x).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(model["proj"](x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_unet_has_the_gradients_of_the_one_that_is_not(reentrant: bool) -> None:
    torch.manual_seed(0)
    unet = tiny_unet().requires_grad_(False)
    adapter = attach(unet)
    shake(adapter)
    given = unet_inputs()
    given["sample"].requires_grad_()

    def gradients() -> list[Tensor]:
        adapter.zero_grad()
        unet(**given).sample.square().mean().backward()
        return [p.grad.clone() for p in adapter.parameters() if p.grad is not None]

    expected = gradients()
    unet.enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, use_reentrant=reentrant))
    for found, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-8)


def test_weights_changed_before_the_backward_are_an_error() -> None:
    model, _ = one("ether_plus", bias=False)
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    output = model["proj"](x)
    model["proj"].weight.data.mul_(2)  # does not count
    with torch.no_grad():
        model["proj"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def sd3() -> nn.Module:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        **{"sample_size": 32, "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 6},
        **{"joint_attention_dim": 64, "caption_projection_dim": 384, "pooled_projection_dim": 64},
        **{"out_channels": 16, "pos_embed_max_size": 16, "qk_norm": "rms_norm"},
    ).requires_grad_(False)


def sd3_inputs() -> dict[str, Tensor]:
    given = {"hidden_states": torch.randn(2, 16, 32, 32), "encoder_hidden_states": torch.randn(2, 77, 64)}
    return given | {"pooled_projections": torch.randn(2, 64), "timestep": torch.tensor([500.0, 300.0])}


KEPT: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "transformer": (sd3, sd3_inputs),
    "unet": (
        lambda: tiny_unet(block_out_channels=(64, 256), attention_head_dim=8).requires_grad_(False),
        lambda: {**unet_inputs(batch=4), "sample": torch.randn(4, 4, 32, 32)},
    ),
}


@pytest.mark.parametrize("model", KEPT)
@pytest.mark.parametrize("kind", ["ether", "ether_plus"])
def test_no_more_is_kept_than_lora_keeps(model: str, kind: str, request: pytest.FixtureRequest) -> None:
    if "output kept" in request.node.name:
        pytest.skip("that way is for few tokens on a CPU")
    build, inputs = KEPT[model]
    base, given = build(), inputs()
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    adapter = attach(ours, EtherConfig(kind))
    names = [target.path for target in find_targets(theirs)]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=names), theirs)
    found = {}
    for name, each, own in (("ours", ours, list(adapter.parameters())), ("LoRA", theirs, [])):

        def run(each: nn.Module = each) -> None:
            each(**given).sample.square().mean().backward()

        found[name] = kept_bytes(run, [*each.parameters(), *each.buffers(), *own])
    assert found["ours"] <= 1.05 * found["LoRA"], found
