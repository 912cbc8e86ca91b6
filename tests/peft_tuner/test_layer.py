"""The tuner's layer against dense fp64: forward, gradients, merging, several adapters, scales."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import accelerate
import peft
import pytest
import torch
from helpers import DIRECT, dense_weight, relative_error
from peft_tuner.models import (
    KINDS,
    NARROW,
    WIDE,
    add,
    batch,
    config,
    copied,
    dense,
    layers,
    output,
    small,
    tuned,
    weights,
)
from torch import Tensor, nn

from ether_diffusion.peft_tuner import EtherLinear

KIND = pytest.mark.parametrize("kind", KINDS)
WHOLE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}
"""Relative error of the small model, three Linears deep."""


@KIND
@pytest.mark.parametrize("dtype", DIRECT)
def test_a_layer_is_the_dense_product(kind: str, dtype: torch.dtype) -> None:
    model = tuned(kind, dtype)
    for layer in layers(model).values():
        x = batch(7, dtype, layer.in_features)
        bias = layer.bias.detach().double()
        assert relative_error(layer(x), x.double() @ dense(layer, {"default": 1.0}).T + bias) < DIRECT[dtype]
        assert relative_error(layer.base_layer(x), x.double() @ dense(layer, {"default": 1.0}).T + bias) > 0.1


@KIND
@pytest.mark.parametrize("dtype", WHOLE)
def test_gradients_are_those_of_dense_weights(kind: str, dtype: torch.dtype) -> None:
    model, x = tuned(kind, dtype).train(), batch(dtype=dtype)
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(vectors) == sum(len(list(each.ether_methods.parameters())) for each in layers(model).values())
    found = torch.autograd.grad(model(x).float().square().mean(), vectors)
    expected = torch.autograd.grad(output(model, x, {"default": 1.0}).square().mean(), vectors)
    assert all(each.dtype == torch.float32 for each in found)
    both = [torch.cat([each.double().flatten() for each in gradients]) for gradients in (found, expected)]
    assert relative_error(*both) < WHOLE[dtype]


@KIND
def test_the_gradient_of_the_input_is_that_of_dense_weights(kind: str) -> None:
    model = tuned(kind)
    x, same = batch().requires_grad_(), batch().double().requires_grad_()
    (found,) = torch.autograd.grad(model(x).square().mean(), x)
    (expected,) = torch.autograd.grad(output(model, same, {"default": 1.0}).square().mean(), same)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("kind", ["ether_plus", "one_sided", "anchored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_but_ether_start_as_the_identity_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    x, base = batch(dtype=dtype), small(dtype)
    model = peft.get_peft_model(small(dtype), config(kind, init_weights=True))
    assert torch.equal(model(x), base(x))


def test_ether_starts_as_a_reflection() -> None:
    model = peft.get_peft_model(small(), config("ether", init_weights=True))
    for layer in layers(model).values():
        distance = (dense(layer, {"default": 1.0}) - layer.base_layer.weight.double()).norm()
        assert distance > 0.5


@KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("safe", [False, True])
def test_merged_weights_are_dense_ones_and_unmerging_restores_every_bit(
    kind: str, dtype: torch.dtype, safe: bool
) -> None:
    model = tuned(kind, dtype)
    before = weights(model)
    x = batch(dtype=dtype)
    unmerged = model(x)
    expected = {name: dense(layer, {"default": 1.0}) for name, layer in layers(model).items()}
    model.merge_adapter(safe_merge=safe)
    for name, layer in layers(model).items():
        assert layer.merged_adapters == ["default"]
        few_roundings = max(torch.finfo(dtype).eps, 1e-6)
        assert relative_error(layer.base_layer.weight, expected[name]) < few_roundings
    assert relative_error(model(x), unmerged) < WHOLE[dtype]
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert torch.equal(model(x), unmerged)


def test_merging_one_after_the_other_gives_the_sum_and_unmerging_restores_every_bit() -> None:
    model = tuned("ether_plus")
    add(model, "ether", "other")
    before, layer = weights(model), layers(model)["first"]
    expected = dense(layer, {"default": 1.0, "other": 1.0})
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["other"])
    assert layer.merged_adapters == ["default", "other"]
    assert relative_error(layer.base_layer.weight, expected) < 1e-6
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@KIND
def test_merge_and_unload_leaves_plain_linears_with_dense_weights(kind: str) -> None:
    model, x = tuned(kind), batch()
    expected = output(model, x, {"default": 1.0})
    plain = model.merge_and_unload()
    assert type(plain.first) is nn.Linear
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
    assert relative_error(plain(x), expected) < 1e-5


def test_unload_gives_the_base_back() -> None:
    base, x = small(), batch()
    plain = tuned("ether").unload()
    assert torch.equal(plain(x), base(x))
    assert plain.__dict__.keys() == base.__dict__.keys()


def test_what_else_was_written_into_a_merged_weight_is_not_lost_in_silence() -> None:
    model = tuned("ether_plus")
    model.merge_adapter()
    layer = layers(model)["first"]
    with torch.no_grad():
        layer.base_layer.weight[0, 0] += 1.0
    changed = layer.base_layer.weight.clone()
    with pytest.raises(RuntimeError, match="the weight of first was changed since"):
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, changed)
    assert layer.merged


@pytest.mark.parametrize("merged", [False, True])
def test_a_broken_vector_is_not_merged_safely(merged: bool) -> None:
    model = tuned("ether_plus")
    add(model, "ether", "broken")
    layer = layers(model)["first"]
    if merged:
        layer.merge(adapter_names=["default"])
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.ether_methods["broken"].u[0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter broken seems"):
            layer.merge(safe_merge=True, adapter_names=["broken"])
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.merged_adapters == ["default"] * merged


def test_a_weight_that_is_also_another_modules_is_not_merged_into() -> None:
    model = tuned("ether_plus", target_modules=["first"])
    inner = model.base_model.model
    inner.classifier = nn.Linear(NARROW, WIDE)
    inner.classifier.weight = inner.first.base_layer.weight
    with pytest.raises(ValueError, match="cannot merge into first: its weight is also that of classifier"):
        model.merge_adapter()
    assert not layers(model)["first"].merged


def test_active_adapters_add_their_updates() -> None:
    model, x = tuned("ether_plus"), batch()
    add(model, "ether", "other", target_modules=["first"])
    model.base_model.set_adapter(["default", "other"])
    assert relative_error(model(x), output(model, x, {"default": 1.0, "other": 1.0})) < 1e-5
    model.set_adapter("other")
    assert relative_error(model(x), output(model, x, {"other": 1.0})) < 1e-5
    with model.disable_adapter():
        assert torch.equal(model(x), small()(x))
    assert relative_error(model(x), output(model, x, {"other": 1.0})) < 1e-5


def test_the_order_of_activation_changes_no_bit() -> None:
    model, x = tuned("ether_plus"), batch()
    add(model, "ether", "other")
    model.base_model.set_adapter(["default", "other"])
    one = model(x)
    model.base_model.set_adapter(["other", "default"])
    assert torch.equal(model(x), one)


def test_deleting_an_adapter_leaves_the_others() -> None:
    model, x = tuned("ether_plus"), batch()
    add(model, "ether", "other")
    model.set_adapter("other")
    expected = model(x)
    model.delete_adapter("default")
    assert torch.equal(model(x), expected)
    assert all(list(layer.ether_methods) == ["other"] for layer in layers(model).values())
    assert all(list(layer.projection.methods) == ["other"] for layer in layers(model).values())


def test_disabling_a_merged_adapter_gives_the_base_back() -> None:
    model, x = tuned("ether_plus"), batch()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), small()(x))


@KIND
@pytest.mark.parametrize("scale", [0.5, -1.0, 0.0])
def test_a_scale_is_the_strength_of_the_update(kind: str, scale: float) -> None:
    model, x = tuned(kind), batch()
    for layer in layers(model).values():
        layer.set_scale("default", scale)
    assert relative_error(model(x), output(model, x, {"default": scale})) < 1e-5
    before = weights(model)
    model.merge_adapter()
    assert relative_error(model(x), output_of(model, before, x, scale)) < 1e-5
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def output_of(model: nn.Module, base: dict[str, Tensor], x: Tensor, scale: float) -> Tensor:
    """The dense output from weights that are not in the model now."""
    plain = copied(model)
    for name, layer in layers(plain).items():
        layer.base_layer.weight.data = base[name].clone()
    return output(plain, x, {"default": scale})


@pytest.mark.parametrize("scale", [0.3, 0.7, 0.0, -2.0])
def test_unscaling_restores_every_bit_even_after_zero(scale: float) -> None:
    model, x = tuned("ether_plus"), batch()
    for layer in layers(model).values():
        layer.set_scale("default", 0.9)
    before = model(x)
    for layer in layers(model).values():
        layer.scale_layer(scale)
    assert relative_error(model(x), output(model, x, {"default": 0.9 * scale})) < 1e-5
    for layer in layers(model).values():
        layer.unscale_layer(scale)
    assert torch.equal(model(x), before)


def test_scale_verbs_follow_pefts_meaning() -> None:
    layer = layers(tuned("ether_plus"))["first"]
    layer.set_scale("default", 0.5)
    layer.scale_layer(2.0)
    layer.unscale_layer(4.0)
    assert layer.strength("default") == 0.25
    layer.unscale_layer()
    assert layer.strength("default") == 1.0
    layer.set_scale("not here", 3.0)
    with pytest.raises(ValueError, match="nothing can be divided by 0"):
        layer.unscale_layer(0)
    with pytest.raises(ValueError, match="must be a finite number, not inf"):
        layer.set_scale("default", float("inf"))


def test_scaling_a_merged_adapter_warns_and_unmerging_restores_every_bit_all_the_same() -> None:
    model, x = tuned("ether_plus"), batch()
    before, layer = weights(model), layers(model)["first"]
    model.merge_adapter()
    with pytest.warns(UserWarning, match="default is merged: its new scale holds from the next merge on"):
        layer.set_scale("default", 0.5)
    with pytest.warns(UserWarning, match="default is merged"):
        layer.scale_layer(0.5)
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    layers(model)["second"].set_scale("default", 0.25)
    assert relative_error(model(x), output(model, x, {"default": 0.25})) < 1e-5


def test_a_base_that_accelerate_offloads_is_transformed_merged_and_restored() -> None:
    model, x = tuned("ether_plus"), batch()
    before, expected = weights(model), model(x)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(layer.base_layer.weight.is_meta for layer in layers(model).values())
    assert torch.allclose(offloaded(x), expected, atol=1e-6)
    model.merge_adapter()
    assert torch.allclose(offloaded(x), expected, atol=1e-6)
    model.unmerge_adapter()
    accelerate.hooks.remove_hook_from_submodules(model)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_only_active_adapters_are_scaled() -> None:
    model = tuned("ether_plus")
    add(model, "ether", "other")
    layer = layers(model)["first"]
    layer.scale_layer(0.5)
    assert (layer.strength("default"), layer.strength("other")) == (0.5, 1.0)


def test_the_update_of_an_adapter_is_exactly_of_its_rank_and_a_lora_of_it_is_exact() -> None:
    for kind, rank in (("ether", 2), ("one_sided", 2), ("anchored", 8), ("ether_plus", 16)):
        model, x = tuned(kind), batch()
        for layer in layers(model).values():
            delta = layer.get_delta_weight("default").double()
            assert relative_error(delta, dense(layer, {"default": 1.0}) - layer.base_layer.weight.double()) < 1e-6
            assert int(torch.linalg.matrix_rank(delta, rtol=1e-5)) <= rank
        assert model.supports_lora_conversion()
        settings, state = peft.convert_to_lora(model, rank=rank)
        lora = peft.get_peft_model(small(), settings)
        peft.set_peft_model_state_dict(lora, state)
        assert relative_error(lora(x), output(model, x, {"default": 1.0})) < 1e-5


def test_the_delta_of_a_merged_adapter_is_of_the_base() -> None:
    model = tuned("ether_plus")
    layer = layers(model)["first"]
    before = layer.get_delta_weight("default")
    layer.merge()
    assert torch.equal(layer.get_delta_weight("default"), before)


def test_a_copy_has_its_own_vectors_and_forwards() -> None:
    model, x = tuned("ether_plus"), batch()
    other = copy.deepcopy(model)
    expected = model(x)
    with torch.no_grad():
        for layer in layers(other).values():
            layer.ether_methods["default"].v.neg_().add_(0.1)
    assert torch.equal(model(x), expected)
    assert relative_error(other(x), output(other, x, {"default": 1.0})) < 1e-5


def test_a_merged_model_can_be_copied_cast_and_pickled_and_is_unmerged_all_the_same() -> None:
    model, x = tuned("ether_plus"), batch()
    model.merge_adapter()
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    other.unmerge_adapter()
    assert torch.equal(layers(other)["first"].base_layer.weight, small().first.weight)
    assert relative_error(other(x), output(other, x, {"default": 1.0})) < 1e-5
    model.to(torch.bfloat16).unmerge_adapter()
    assert torch.equal(layers(model)["first"].base_layer.weight, small(torch.bfloat16).first.weight)


@pytest.mark.parametrize("shape", [(NARROW,), (0, NARROW), (2, 3, NARROW)])
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    model = tuned("ether_plus")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found, expected = model(x), output(model, x, {"default": 1.0})
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_modules_to_save_are_trained_and_saved_whole(tmp_path: Path) -> None:
    model = tuned("ether_plus", modules_to_save=["classifier"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-1] for name in trained if "classifier" in name} == {"weight", "bias"}
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(small(), tmp_path)
    assert torch.equal(again(batch()), model(batch()))


def test_two_adapters_may_each_save_a_module_whole(tmp_path: Path) -> None:
    model = tuned("ether_plus", modules_to_save=["classifier"])
    add(model, "ether", "other", modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["other"].weight.add_(1.0)
    model.set_adapter("other")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(small(), tmp_path / "other")
    assert torch.equal(again(batch()), model(batch()))


def test_layers_to_transform_chooses_by_index() -> None:
    blocks = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(3)])
    deep = nn.ModuleDict({"decoder": nn.ModuleDict({"layers": blocks})})
    model = peft.get_peft_model(deep, config("ether", target_modules=["proj"], layers_to_transform=[0, 2]))
    found = [path for path, module in model.base_model.model.named_modules() if isinstance(module, EtherLinear)]
    assert found == ["decoder.layers.0.proj", "decoder.layers.2.proj"]


def test_a_seed_gives_the_vectors_of_attach() -> None:
    import ether_diffusion as ether

    model = peft.get_peft_model(small(), config("ether_plus", seed=5, init_weights=True))
    adapter = ether.attach(small(), ether.EtherConfig("ether_plus", targets=("first", "second"), seed=5))
    for path, method in adapter.methods().items():
        ours = layers(model)[path].ether_methods["default"].state_dict()
        assert all(torch.equal(ours[key], value) for key, value in method.state_dict().items())
    assert torch.equal(
        dense_weight(small().first.weight, dict(adapter.methods()["first"].named_parameters())),
        dense(layers(model)["first"], {"default": 1.0}),
    )


def test_without_a_seed_vectors_come_from_torchs_generator() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = peft.get_peft_model(small(), config("ether"))
        return layers(model)["first"].ether_methods["default"].u.detach()

    with torch.random.fork_rng(devices=[]):
        assert torch.equal(first(3), first(3))
        assert not torch.equal(first(3), first(4))
