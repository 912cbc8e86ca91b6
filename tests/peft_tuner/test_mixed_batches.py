"""A batch whose samples have adapters of their own: every sample as in a run of its adapter alone."""

from __future__ import annotations

import threading

import peft
import pytest
import torch
from helpers import DIRECT, relative_error
from peft_tuner.models import KINDS, add, batch, dense, layers, output, small, tuned
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from ether_diffusion.core.plan import PerSample
from ether_diffusion.peft_tuner import EtherPeftConfig

KIND = pytest.mark.parametrize("kind", KINDS)
NAMES = ["other", "__base__", "default", "other", "default"]


def alone(model: nn.Module, x: Tensor, names: list[str], scales: dict[str, float] | None = None) -> Tensor:
    """Each sample by dense fp64 weights of its own."""
    strengths = {"default": 1.0, "other": 1.0, **(scales or {})}
    of_name = {name: output(model, x, {name: strengths.get(name, 0.0)}) for name in set(names)}
    return torch.stack([of_name[name][i] for i, name in enumerate(names)])


@KIND
@pytest.mark.parametrize("other", KINDS)
@torch.no_grad()
def test_every_sample_has_its_own_adapter_whatever_their_kinds(kind: str, other: str) -> None:
    model, x = tuned(kind), batch()
    add(model, other, "other")
    assert relative_error(model(x, adapter_names=NAMES), alone(model, x, NAMES)) < 1e-5


@KIND
@pytest.mark.parametrize("dtype", DIRECT)
@torch.no_grad()
def test_a_layer_in_a_mixed_batch_is_dense_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    model = tuned(kind, dtype)
    add(model, kind, "other")
    for layer in layers(model).values():
        x = batch(5, dtype, layer.in_features)
        rows = [dense(layer, {name: 1.0}) @ x[i].double() for i, name in enumerate(NAMES)]
        found = layer(x, adapter_names=NAMES)
        assert relative_error(found, torch.stack(rows) + layer.bias.double()) < DIRECT[dtype]


@torch.no_grad()
def test_scales_hold_in_a_mixed_batch() -> None:
    model, x = tuned("ether_plus"), batch()
    add(model, "ether_plus", "other")
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
    assert relative_error(model(x, adapter_names=NAMES), alone(model, x, NAMES, {"default": 0.5})) < 1e-5
    for layer in layers(model).values():
        layer.set_scale("other", 0.0)
    expected = alone(model, x, NAMES, {"default": 0.5, "other": 0.0})
    assert relative_error(model(x, adapter_names=NAMES), expected) < 1e-5


@torch.no_grad()
def test_an_adapter_that_a_layer_lacks_is_the_base_there() -> None:
    model, x = tuned("ether_plus", target_modules=["first"]), batch()
    add(model, "ether_plus", "other", target_modules=["second"])
    assert relative_error(model(x, adapter_names=NAMES), dense_by_layer(model, x)) < 1e-5


def dense_by_layer(model: nn.Module, x: Tensor) -> Tensor:
    inner, rows = model.base_model.model, []
    for i, name in enumerate(NAMES):
        hidden = x[i].double()
        for layer in (inner.first, inner.second):
            hidden = torch.tanh(dense(layer, {name: 1.0}) @ hidden + layer.bias.double())
        rows.append(inner.classifier.weight.double() @ hidden + inner.classifier.bias.double())
    return torch.stack(rows)


@torch.no_grad()
def test_samples_of_one_kind_cost_one_call_of_the_projection() -> None:
    model, x = tuned("ether_plus"), batch()
    add(model, "ether_plus", "other")
    calls, layer = [], layers(model)["first"]
    layer.base_layer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    model(x, adapter_names=NAMES)
    assert calls == [5]
    assert not isinstance(layer.projection.plan, PerSample), "the plan of a call is not kept"


@torch.no_grad()
def test_modules_to_save_take_part() -> None:
    model, x = tuned("ether_plus", modules_to_save=["classifier"]), batch()
    wrapper = model.base_model.model.classifier
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.add_(1.0)
    names = ["default", "__base__", "default", "__base__", "__base__"]
    found = model(x, adapter_names=names)
    model.set_adapter("default")
    expected, base = model(x), small()(x)
    for i, name in enumerate(names):
        assert torch.allclose(found[i], (expected if name == "default" else base)[i], atol=1e-6)


@torch.no_grad()
def test_threads_do_not_mix_their_batches() -> None:
    model, x = tuned("ether_plus"), batch(4)
    add(model, "ether", "other")
    expected = {name: alone(model, x, [name] * 4) for name in ("default", "other", "__base__")}
    errors: list[str] = []
    together = threading.Barrier(3)

    def serve(name: str) -> None:
        together.wait()
        for _ in range(40):
            with torch.no_grad():
                error = relative_error(model(x, adapter_names=[name] * 4), expected[name])
            if error > 1e-5:
                errors.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_what_cannot_be_mixed_is_refused() -> None:
    model, x = tuned("ether_plus"), batch()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): stranger"):
        model(x, adapter_names=["stranger"] * 5)
    with pytest.raises(ValueError, match="but got 4 and 5 respectively"):
        model(x, adapter_names=["default"] * 4)
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(x, adapter_names=["default"] * 5)
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="in training mode"):
        model(x, adapter_names=["default"] * 5)
    assert layers(model)["first"].forwards.mixed == 0


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=1, pad_token_id=2)).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("build", [llama, t5])
def test_generation_with_beams_equals_each_adapter_alone(build: object, beams: int) -> None:
    with torch.random.fork_rng(devices=[]):
        base = build()  # type: ignore[operator]
        task = "CAUSAL_LM" if build is llama else "SEQ_2_SEQ_LM"
        settings = [
            EtherPeftConfig(init_weights=False, task_type=task),
            EtherPeftConfig(variant="ether", n_blocks=2, task_type=task),
        ]
        model = peft.get_peft_model(base, settings[0])
        model.add_adapter("other", settings[1])
        model.eval()
        ids = torch.randint(3, 64, (3, 5))
    options = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    names = ["other", "__base__", "default"]
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = model.generate(input_ids=ids, **options)
    with model.disable_adapter():
        expected["__base__"] = model.generate(input_ids=ids, **options)
    found = model.generate(input_ids=ids, adapter_names=names, **options)
    assert all(torch.equal(found[i], expected[name][i]) for i, name in enumerate(names))
    assert not torch.equal(expected["default"], expected["other"])
