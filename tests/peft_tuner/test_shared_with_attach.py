"""One layer and one plan in both worlds: the tuner computes what ``attach`` does, as fast."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from unittest import mock

import peft
import pytest
import torch
from helpers import shake, unet_inputs
from peft_tuner.models import KINDS, batch, layers, small, tuned
from peft_tuner.test_diffusers import ATTENTION, build
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import ether_diffusion as ether
from ether_diffusion.core import functional, linear, rows
from ether_diffusion.peft_tuner import EtherLinear, EtherPeftConfig


def twins(kind: str) -> tuple[nn.Module, nn.Module]:
    """A UNet with an adapter of attach, and one with the same vectors in PEFT."""
    settings = KINDS[kind]
    ours, theirs = build(), build()
    config = ether.EtherConfig(
        str(settings["variant"]), int(str(settings["n_blocks"])), bool(settings.get("two_sided", True))
    )
    adapter = ether.attach(ours, config)
    shake(adapter)
    theirs.add_adapter(EtherPeftConfig(target_modules=ATTENTION, **settings))  # type: ignore[arg-type]
    for path, method in adapter.methods().items():
        theirs.get_submodule(path).ether_methods["default"].load_state_dict(method.state_dict())
    return ours, theirs


def steps(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Output and all gradients of a training step."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    sample = model(**unet_inputs()).sample
    if not parameters:  # attach keeps its vectors beside the model
        parameters = list(next(iter(ether.core.host.host_of(model).adapters.values())).parameters())
    gradients = torch.autograd.grad(sample.square().mean(), parameters)
    return sample.detach(), torch.cat([gradient.flatten().sort().values for gradient in gradients]).sort().values


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_the_same_bit_for_bit(kind: str) -> None:
    ours, theirs = twins(kind)
    (sample, gradients), (their_sample, their_gradients) = steps(ours), steps(theirs)
    assert torch.equal(sample, their_sample)
    assert torch.equal(gradients, their_gradients)


@pytest.fixture
def made() -> Iterator[list[int]]:
    """How many sides' rows each call of block_rows has made."""
    calls: list[int] = []
    original = functional.block_rows

    def counted(formula: functional.Formula, u: Tensor, v: Tensor | None = None) -> functional.Rows:
        calls.append(len(u) if u.ndim == 3 else 1)
        return original(formula, u, v)

    with mock.patch.object(rows, "block_rows", counted), mock.patch("ether_diffusion.core.methods.block_rows", counted):
        yield calls


def test_rows_are_made_together_once_per_layout_at_the_start_of_a_forward(made: list[int]) -> None:
    ours, theirs = twins("ether_plus")
    ours(**unet_inputs())
    of_attach = sorted(made)
    made.clear()
    theirs(**unet_inputs())
    assert sorted(made) == of_attach
    sides = 2 * sum(isinstance(module, EtherLinear) for module in theirs.modules())
    assert sum(made) == sides
    assert len(made) < sides / 4


def test_a_layer_that_is_called_alone_makes_its_own_rows(made: list[int]) -> None:
    layer = layers(tuned("ether_plus"))["first"]
    layer(batch())
    assert made == [1, 1]


def test_a_step_of_the_optimizer_is_seen_by_the_next_forward() -> None:
    model, x = tuned("ether_plus").train(), batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = (model(x) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_the_layer_adds_no_hook_and_no_second_matmul() -> None:
    model = tuned("ether_plus")
    layer = layers(model)["first"]
    assert not layer.base_layer._forward_hooks
    assert not layer.base_layer._forward_pre_hooks
    calls = []
    with mock.patch.object(linear, "image", side_effect=AssertionError("a second matmul")):
        layer.base_layer.register_forward_hook(lambda module, args, output: calls.append(1))
        layer.set_scale("default", 0.5)
        model(batch())
    assert calls == [1]


def test_compiled_code_equals_eager_code_with_and_without_a_mixed_batch() -> None:
    model, x = tuned("ether_plus"), batch()
    names = ["default", "__base__", "default", "__base__", "default"]
    with torch.no_grad():
        base = small()(x)
        expected, mixed = model(x), model(x, adapter_names=names)
        torch._dynamo.reset()
        model.base_model.model.compile(backend="eager", fullgraph=False)
        assert torch.allclose(model(x), expected, atol=1e-6)
        assert torch.allclose(model(x, adapter_names=names), mixed, atol=1e-6)
        assert torch.allclose(model(x), expected, atol=1e-6)
        for layer in layers(model).values():
            layer.set_scale("default", 0.0)
        assert torch.allclose(model(x), base, atol=1e-6)
        for layer in layers(model).values():
            layer.set_scale("default", 1.0)
        assert torch.allclose(model(x), expected, atol=1e-6)
        with model.disable_adapter():
            assert torch.allclose(model(x), base, atol=1e-6)
        assert not torch.allclose(expected, base, atol=1e-3)


def test_compiled_code_sees_vectors_that_are_loaded_and_strengths_without_compiling_again() -> None:
    model, x = tuned("ether_plus"), batch()
    other = {key: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
    for key in other:
        other[key] = other[key].flip(0)
    model.set_adapter("default", inference_mode=True)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        first = compiled(x)
        assert torch.allclose(first, model(x), atol=1e-5)
        graphs = counter.frame_count
        for layer in layers(model).values():
            layer.set_scale("default", 0.5)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
        peft.set_peft_model_state_dict(model, other)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
        assert not torch.allclose(compiled(x), first, atol=1e-3)
        assert counter.frame_count == graphs


def test_a_layer_compiles_to_one_graph() -> None:
    layer = layers(tuned("ether_plus"))["first"]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(batch()), layer(batch()), atol=1e-6)


def test_the_keys_of_a_file_are_those_of_the_methods() -> None:
    state = peft.get_peft_model_state_dict(tuned("ether_plus"))
    assert set(state) == {
        f"base_model.model.{layer}.ether_methods.{vector}"
        for layer in ("first", "second")
        for vector in ("u", "v", "u_out", "v_out")
    }


@pytest.mark.parametrize("inference_mode", [False, True])
def test_blocks_of_one_kind_share_one_compiled_code(inference_mode: bool) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*[nn.Sequential(OrderedDict(linear=nn.Linear(8, 8), act=nn.Tanh())) for _ in range(12)])
    model = peft.get_peft_model(blocks, EtherPeftConfig(target_modules=["linear"], init_weights=False))
    model.set_adapter("default", inference_mode=inference_mode)
    x, twin = torch.randn(3, 8, requires_grad=not inference_mode), copy.deepcopy(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.base_model.model:
        block.compile(backend=counter, fullgraph=True)
    with torch.set_grad_enabled(not inference_mode):
        assert torch.allclose(model(x), twin(x), atol=1e-6)
    assert counter.frame_count == 1
