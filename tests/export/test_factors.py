"""The factors are the update, in fp64; and what has no low rank, or cannot be read, is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export.conftest import adapted, shaken
from helpers import relaxed

import ether_diffusion as ether
from ether_diffusion.core.host import host_of
from ether_diffusion.export.factors import ExportError, lora_layers
from ether_diffusion.families.quantization import quantize

RANKS = {"ether": 4, "anchored": 8, "ether_plus": 16, "ether_plus_free": 16}
"""n, 2 n, and 4 n of two sides."""


@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("family", ["sd", "sd3", "flux", "flux2", "z_image"])
def test_up_times_down_is_the_update(family: str, method: str) -> None:
    pipe = adapted(family, "all", method)
    model = pipe.unet if family == "sd" else pipe.transformer
    (adapter,) = host_of(model).adapters.values()  # type: ignore[union-attr]
    methods, ranks = adapter.methods(), set()
    for layer in lora_layers(pipe, {"a": 0.5}):
        weight = model.get_submodule(layer.path).weight.detach().double()
        delta = methods[layer.path].double().delta_weight(weight)
        torch.testing.assert_close(layer.up @ layer.down, 0.5 * delta, rtol=0, atol=1e-12 * float(weight.abs().sum()))
        ranks.add(layer.rank)
        methods.pop(layer.path)
    assert not methods, "every projection has a layer"
    assert min(ranks) == RANKS[method]  # parts of fused layers add theirs


def test_it_is_the_papers_formula() -> None:
    pipe = adapted("sd")
    adapter = host_of(pipe.unet).adapters["a"]  # type: ignore[union-attr]
    layer = next(lora_layers(pipe, {"a": 1.0}))
    state = {key.removeprefix(f"{layer.path}."): v for key, v in adapter.state_dict().items() if layer.path in key}
    weight = pipe.unet.get_submodule(layer.path).weight.detach().double()
    expected = relaxed(state["u_out"], state["v_out"]) @ weight @ relaxed(state["u"], state["v"]) - weight
    torch.testing.assert_close(layer.up @ layer.down, expected, rtol=0, atol=1e-12)


def test_several_adapters_add_up() -> None:
    pipe = adapted("sd")
    shaken(ether.attach(pipe.unet, ether.EtherConfig("ether", seed=5), "b"), seed=5)
    together = {layer.path: layer for layer in lora_layers(pipe, {"a": 0.5, "b": -1.5})}
    first, second = ({each.path: each for each in lora_layers(pipe, {n: s})} for n, s in (("a", 0.5), ("b", -1.5)))
    for path, layer in together.items():
        expected = first[path].up @ first[path].down + second[path].up @ second[path].down
        torch.testing.assert_close(layer.up @ layer.down, expected, rtol=0, atol=1e-12)
        assert layer.rank == first[path].rank + second[path].rank == 20


def test_no_rank_is_above_the_width_of_its_layer() -> None:
    pipe = adapted("sd")
    for seed, name in enumerate("bcd"):
        shaken(ether.attach(pipe.unet, ether.EtherConfig("ether_plus", seed=seed), name), seed=seed)
    host, ranks = host_of(pipe.unet), set()
    assert host is not None
    strengths = dict.fromkeys("abcd", 1.0)
    deltas = {name: adapter.methods() for name, adapter in host.adapters.items()}
    for layer in lora_layers(pipe, strengths):
        weight = pipe.unet.get_submodule(layer.path).weight.detach().double()
        assert layer.rank == min(4 * 16, *weight.shape)
        ranks.add(layer.rank)
        expected = sum(deltas[name][layer.path].double().delta_weight(weight) for name in "abcd")
        torch.testing.assert_close(layer.up @ layer.down, expected, rtol=0, atol=1e-10)
    assert len(ranks) > 1


def test_what_has_no_low_rank_is_refused() -> None:
    with pytest.raises(ExportError, match="Naive adapter, whose update is of full rank"):
        list(lora_layers(adapted("sd", method="naive"), {"a": 1.0}))


def test_a_base_that_cannot_be_read_is_refused() -> None:
    pipe = adapted("sd3")
    ether.unload(pipe, "a")
    quantize(pipe.transformer, "fp8-storage", torch.device("cpu"))
    ether.attach(pipe.transformer, ether.EtherConfig(), "a")
    with pytest.raises(ExportError, match=r"quantised or offloaded.* load the base in full precision"):
        list(lora_layers(pipe, {"a": 1.0}))


def test_weights_that_are_not_the_bases_are_refused(tmp_path: Path) -> None:
    pipe = adapted("sd")
    ether.fuse(pipe)
    with pytest.raises(RuntimeError, match="fused"):
        list(lora_layers(pipe, {"a": 1.0}))
    ether.unfuse(pipe)
    assert list(lora_layers(pipe, {"a": 1.0}))
    ether.export_lora(pipe, tmp_path / "lora.safetensors")
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    assert list(lora_layers(pipe, {"a": 1.0})), "beside a LoRA the base is still there"
    ether.disable(pipe)
    pipe.fuse_lora()
    with pytest.raises(RuntimeError, match="merged"):
        list(lora_layers(pipe, {"a": 1.0}))


def test_an_unknown_adapter_is_named() -> None:
    with pytest.raises(ValueError, match="no adapter"):
        list(lora_layers(adapted("sd"), {"b": 1.0}))
