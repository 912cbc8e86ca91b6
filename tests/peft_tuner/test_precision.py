"""Vectors are fp32 under every way into PEFT, and quantised bases are transformed as their dequantised weights are."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import DIRECT, dense_weight, relative_error
from peft.utils.integrations import dequantize_module_weight
from peft_tuner.models import KINDS, add, batch, config, dense, layers, output, small, tuned
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ether_diffusion.families.quantization import _quantized
from ether_diffusion.peft_tuner import EtherPeftConfig
from ether_diffusion.playground.tiny import tiny_unet

KIND = pytest.mark.parametrize("kind", KINDS)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
SMALL_STEP = 1e-3
"""|v - u| as early training has it."""


def vectors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if ".ether_methods." in name}


def by_get_peft_model(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, config("ether_plus"))


def by_get_peft_model_without_autocast(model: nn.Module) -> nn.Module:
    with pytest.warns(UserWarning, match="the vectors of ETHER stay fp32"):
        return peft.get_peft_model(model, config("ether_plus"), autocast_adapter_dtype=False)


def by_injection(model: nn.Module) -> nn.Module:
    return peft.inject_adapter_in_model(config("ether_plus"), model)


def by_adding(model: nn.Module) -> nn.Module:
    found = peft.get_peft_model(model, config("ether"))
    found.add_adapter("other", config("ether_plus"))
    return found


def by_casting_afterwards(model: nn.Module) -> nn.Module:
    dtype = next(model.parameters()).dtype
    return peft.get_peft_model(model.float(), config("ether_plus")).to(dtype)


@HALF
@pytest.mark.parametrize(
    "enter", [by_get_peft_model, by_get_peft_model_without_autocast, by_injection, by_adding, by_casting_afterwards]
)
def test_vectors_are_fp32_under_every_entry(enter: Callable[[nn.Module], nn.Module], dtype: torch.dtype) -> None:
    model = enter(small(dtype))
    assert {value.dtype for value in vectors(model).values()} == {torch.float32}
    assert {value.dtype for name, value in model.named_parameters() if "base_layer" in name} == {dtype}


@HALF
def test_vectors_are_fp32_on_a_unet_of_diffusers(dtype: torch.dtype) -> None:
    unet: UNet2DConditionModel = tiny_unet().to(dtype)
    unet.add_adapter(EtherPeftConfig(target_modules=["to_q", "to_k"]))
    assert {value.dtype for value in vectors(unet).values()} == {torch.float32}


@HALF
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore:autocast_adapter_dtype")
def test_vectors_are_fp32_when_loaded_even_from_a_file_in_half_precision(
    dtype: torch.dtype, low_cpu_mem_usage: bool, autocast: bool, tmp_path: Path
) -> None:
    tuned("ether_plus").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": autocast}
    model = peft.PeftModel.from_pretrained(small(dtype), tmp_path, **options)
    model.load_adapter(tmp_path, "other", **options)
    assert {value.dtype for value in vectors(model).values()} == {torch.float32}


@HALF
def test_a_small_update_is_not_rounded_away(dtype: torch.dtype) -> None:
    """In half precision v - u of 1e-3 would be off by several per cent; the output is right to a rounding."""
    linear = small(dtype).first
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.inject_adapter_in_model(EtherPeftConfig(target_modules=["0"], n_blocks=4), nn.Sequential(linear))
    layer = model[0]
    with torch.no_grad():
        for name, vector in layer.ether_methods["default"].named_parameters():
            if name.startswith("v"):
                vector += SMALL_STEP * torch.randn(vector.shape, generator=torch.Generator().manual_seed(1))
    delta = dense(layer, {"default": 1.0}) - linear.weight.double()
    assert relative_error(layer.get_delta_weight("default"), delta) < 1e-3


@HALF
def test_vectors_that_somebody_casts_past_torch_are_told_once(dtype: torch.dtype) -> None:
    """As TRL does on a quantised base: an assignment to ``data`` goes past all that could keep them fp32."""
    model, x = tuned("ether_plus"), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    for vector in vectors(model).values():
        vector.data = vector.data.to(dtype)
    with pytest.warns(UserWarning, match=f"have been cast to {dtype}, where small steps of training are lost"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


@HALF
@KIND
def test_autocast_is_close_to_fp32(kind: str, dtype: torch.dtype) -> None:
    model, x = tuned(kind), batch()
    with torch.autocast("cpu", dtype=dtype):
        found = model(x)
    assert found.dtype == dtype
    assert relative_error(found, output(model, x, {"default": 1.0})) < 3 * DIRECT[dtype]


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def quantized(bits: str, dtype: torch.dtype) -> nn.Module:
    model = small(dtype)
    for name in ("first", "second"):
        setattr(model, name, _quantized(getattr(model, name), bits, dtype).to("cpu"))
    return model


def readable(layer: nn.Module, bits: str) -> Tensor:
    """The weight that a quantised layer computes with."""
    if bits == "nf4":
        return dequantize_module_weight(layer)
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data.float() * (scales.float() / 127)[:, None]


@needs_bitsandbytes
@KIND
@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_base_is_transformed_as_its_dequantised_weight(kind: str, bits: str, dtype: torch.dtype) -> None:
    """Output, gradients and a mixed batch. int8 rounds activations to 8 bits, too: 1 % of the output."""
    tolerance = 0.02 if bits == "int8" else max(DIRECT[dtype], 1e-5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(quantized(bits, dtype), config(kind)).eval()
    add(model, kind, "other")
    layer = layers(model)["first"]
    x = batch(dtype=dtype)
    weight = readable(layer.base_layer, bits)

    def expected(name: str) -> Tensor:
        vectors_ = layer.ether_methods[name].state_dict(keep_vars=True)
        return x.double() @ dense_weight(weight, vectors_).T + layer.bias.double()

    assert relative_error(layer(x), expected("default")) < tolerance
    trained = list(layer.ether_methods["default"].parameters())
    found = torch.autograd.grad(layer(x).float().square().mean(), trained)
    right = torch.autograd.grad(expected("default").square().mean(), trained)
    both = [torch.cat([each.double().flatten() for each in gradients]) for gradients in (found, right)]
    assert relative_error(*both) < 3 * tolerance
    names = ["other", "default", "__base__", "other", "default"]
    mixed = layer(x, adapter_names=names)
    base = x.double() @ weight.double().T + layer.bias.double()
    rows = [(base if name == "__base__" else expected(name))[i] for i, name in enumerate(names)]
    assert relative_error(mixed, torch.stack(rows)) < tolerance


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_merging_into_a_quantised_weight_is_refused_by_name(bits: str) -> None:
    model = peft.get_peft_model(quantized(bits, torch.float32), config("ether_plus"))
    kind = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[bits]
    model.base_model.model.first.base_layer = small().first  # the first could be merged, the second not
    with pytest.raises(ValueError, match=f"cannot merge into {kind}: its weight is quantised"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers(model).values())
    with pytest.raises(ValueError, match=f"cannot merge into {kind}"):
        layers(model)["second"].merge()


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_an_adapter_on_a_quantised_base_is_saved_and_loaded(bits: str, tmp_path: Path) -> None:
    model, x = peft.get_peft_model(quantized(bits, torch.float32), config("ether_plus")).eval(), batch()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(bits, torch.float32), tmp_path).eval()
    assert torch.equal(again(x), model(x))
