"""A base in fewer bits: equal to the dense model with the dequantised weights, forward and gradients, and it learns."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import build
from helpers import shake
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.quantization import quantize
from ether_diffusion.families.registry import family_of
from ether_diffusion.training import program
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
KINDS = [
    pytest.param("nf4", marks=needs_bitsandbytes),
    pytest.param("int8", marks=needs_bitsandbytes),
    "fp8-storage",
]
FAMILIES = ("sd3", "flux", "qwen_image", "z_image", "sd")


def dequantized(module: nn.Module, kind: str) -> Tensor:
    """The weight that a layer computes with."""
    weight = module.weight
    if kind == "nf4":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).reshape(module.out_features, module.in_features)
    scales = module.state.SCB if weight.SCB is None else weight.SCB  # which moves there in the first forward
    return weight.data.float() * (scales.float() / 127)[:, None]


def twin(dense: nn.Module, quantized: nn.Module, kind: str) -> int:
    """Give a dense model the weights of a quantised one; returns how many layers are quantised."""
    count = 0
    for path, module in quantized.named_modules():
        if kind == "fp8-storage":
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype == torch.float8_e4m3fn:
                    dense.get_submodule(path).get_parameter(name).data = parameter.float()
                    count += isinstance(module, nn.Linear)
        elif type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            dense.get_submodule(path).weight.data = dequantized(module, kind)
            count += 1
    return count


def loss(family: Family) -> Tensor:
    """Of a batch of noise."""
    random = torch.Generator().manual_seed(0)
    side = 32 // family.vae_factor
    noisy = torch.randn(2, family.latent_channels, side, side, generator=random)
    times = torch.tensor([250, 700]) if family.NAME == "sd" else torch.tensor([0.25, 0.7])
    with torch.no_grad():
        prompts = family.encode_prompts(["a dog", "two cats"])
    arguments = family.arguments(noisy, times, prompts, torch.zeros(2, 6))
    return family.prediction(family.denoiser(**arguments), noisy).square().mean()


def middle(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline of SD3's with a transformer of 110 M parameters."""
    settings = {"num_layers": 7, "attention_head_dim": 64, "num_attention_heads": 14, "caption_projection_dim": 896}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer = type(pipe.transformer)(**{**pipe.transformer.config, **settings})
    return pipe


SIZES = [
    *FAMILIES,
    pytest.param(
        "sd3, 110 M",
        marks=pytest.mark.skipif(not os.environ.get("ETHER_MID_SIZE"), reason="a minute each: set ETHER_MID_SIZE=1"),
    ),
]


def sized(name: str) -> DiffusionPipeline:
    """A tiny pipeline, or one with a transformer of middle size."""
    family, larger, _ = name.partition(",")
    return middle(build(family)) if larger else build(family)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SIZES)
def test_a_quantised_base_is_the_dense_one_with_its_weights(name: str, kind: str) -> None:
    families = [family_of(sized(name)) for _ in range(2)]
    for family in families:
        family.denoiser.requires_grad_(False)
    quantized, dense = (family.denoiser for family in families)
    quantize(quantized, kind, CPU)
    assert twin(dense, quantized, kind) > 8
    adapters = [ether.attach(family.denoiser, ether.EtherConfig()) for family in families]
    for adapter in adapters:
        shake(adapter)
    losses = [loss(family) for family in families]
    for each in losses:
        each.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    gradients = [torch.cat([p.grad.flatten() for p in adapter.parameters()]) for adapter in adapters]
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_fusing_into_a_quantised_base_is_refused(kind: str) -> None:
    pipe = build("sd3")
    quantize(pipe.transformer, kind, CPU)
    shake(ether.attach(pipe.transformer, ether.EtherConfig()))
    before = {name: value.clone() for name, value in pipe.transformer.named_parameters()}
    with pytest.raises(ValueError, match="cannot fuse"):
        ether.fuse(pipe)
    for name, value in pipe.transformer.named_parameters():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SIZES[:1] + SIZES[-1:])
def test_training_on_a_quantised_base_lowers_the_loss(
    name: str, kind: str, train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized(name).save_pretrained(tmp_path / "base")
    bases: list[nn.Module] = []

    def quantized(denoiser: nn.Module, *arguments: object) -> None:
        quantize(denoiser, *arguments)  # type: ignore[arg-type]
        bases.append(denoiser)

    monkeypatch.setattr(program, "quantize", quantized)
    settings = {"pretrained_model_name_or_path": str(tmp_path / "base"), "base_quantization": kind}
    run = train("sd3", **settings, max_train_steps=20, validation_steps=20, train_batch_size=2)
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert twin(sized(name).transformer, bases[0], kind) > 8, "what was trained on is quantised"


def test_a_base_that_is_trained_itself_is_not_quantised(settings: Callable[..., DreamBoothConfig]) -> None:
    with pytest.raises(ValueError, match="base_quantization is for a frozen base, and method=full"):
        settings("sd", method="full", base_quantization="fp8-storage")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_package_is_named(train: Callable[..., Path]) -> None:
    with pytest.raises(ImportError, match=r"pip install 'ether-diffusion\[quantization\]'"):
        train("sd", base_quantization="nf4")
