"""The verbs of diffusers on ETHER adapters: add_adapter, set_adapters, scales, fusing, deleting, unloading."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from helpers import dense_weight, relative_error, unet_inputs
from torch import Tensor, nn

from ether_diffusion.core.targets import find_targets
from ether_diffusion.peft_tuner import EtherLinear, EtherPeftConfig
from ether_diffusion.playground.tiny import tiny_unet

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def build() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_unet().requires_grad_(False).eval()


def with_two(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet.add_adapter(EtherPeftConfig(target_modules=ATTENTION, init_weights=False), "dog")
        unet.add_adapter(EtherPeftConfig(target_modules=["to_q"], variant="ether", n_blocks=2), "style")
    return unet


@torch.no_grad()
def run(unet: nn.Module) -> Tensor:
    found: Tensor = unet(**unet_inputs()).sample
    return found


def dense(strengths: dict[str, float]) -> Tensor:
    """The output of a UNet whose weights are W + Σ s ΔW, made densely in fp64."""
    adapted, plain = with_two(build()), build()
    targets = {target.path: target.module for target in find_targets(plain)}
    with torch.no_grad():
        for path, layer in adapted.named_modules():
            if isinstance(layer, EtherLinear):
                weight = targets[path].weight
                total = weight.double()
                for name, strength in strengths.items():
                    if name in layer.ether_methods:
                        vectors = layer.ether_methods[name].state_dict(keep_vars=True)
                        total = total + strength * (dense_weight(weight, vectors) - weight.double())
                weight.copy_(total)
    return run(plain)


@pytest.mark.parametrize("strengths", [{"dog": 1.0}, {"dog": 0.5, "style": 0.3}, {"dog": 0.0, "style": -1.0}])
def test_set_adapters_of_the_pipeline_makes_the_mixture(pipe: DiffusionPipeline, strengths: dict[str, float]) -> None:
    pipe.unet = with_two(build())
    pipe.set_adapters(list(strengths), list(strengths.values()))
    assert pipe.get_active_adapters() == list(strengths)
    assert relative_error(run(pipe.unet), dense(strengths)) < 1e-5
    assert relative_error(run(pipe.unet), run(build())) > 1e-3


def test_the_pipeline_draws_with_the_adapter(pipe: DiffusionPipeline) -> None:
    pipe.unet = build()

    def draw() -> Tensor:
        images = pipe("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
        return images.images

    before = draw()
    with_two(pipe.unet)
    pipe.set_adapters(["dog"], [1.0])
    assert not torch.allclose(draw(), before, atol=1e-3)
    pipe.set_adapters(["dog"], [0.0])
    assert torch.equal(draw(), before)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_scaling_for_one_call_is_undone_bit_for_bit(scale: float) -> None:
    unet = with_two(build())
    unet.set_adapters(["dog"], [1.0])
    before = run(unet)
    scale_lora_layers(unet, scale)
    assert relative_error(run(unet), dense({"dog": scale})) < 1e-5
    unscale_lora_layers(unet, scale)
    assert torch.equal(run(unet), before)


def test_fusing_and_unfusing_restores_every_bit() -> None:
    unet = with_two(build())
    unet.set_adapters(["dog", "style"], [1.0, 0.5])
    state, before = {key: value.clone() for key, value in unet.state_dict().items()}, run(unet)
    unet.fuse_lora()
    assert relative_error(run(unet), before) < 1e-5
    unet.unfuse_lora()
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())
    assert torch.equal(run(unet), before)


def test_disabling_deleting_and_unloading_leave_the_base(pipe: DiffusionPipeline) -> None:
    base = run(build())
    pipe.unet = unet = with_two(build())
    unet.disable_adapters()
    assert torch.equal(run(unet), base)
    unet.enable_adapters()
    unet.set_adapters(["dog"], [1.0])
    one = run(unet)
    unet.delete_adapters("style")
    assert torch.equal(run(unet), one)
    pipe.unload_lora_weights()
    assert torch.equal(run(unet), base)
    assert not any(isinstance(module, EtherLinear) for module in unet.modules())
    assert not unet._forward_pre_hooks
    assert not unet._forward_hooks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_the_active_adapter_alone(checkpointing: bool) -> None:
    unet = with_two(build()).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.set_adapter("dog")
    unet(**unet_inputs()).sample.square().mean().backward()
    trained = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in unet.named_parameters() if ".ether_methods.dog." in name}


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        unet = with_two(build()).train()
        unet.set_adapter("dog")
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(**unet_inputs()).sample.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None]))
    assert relative_error(*gradients) < 1e-6


def test_switching_between_forward_and_backward_is_an_error_under_checkpointing() -> None:
    unet = with_two(build()).train()
    unet.enable_gradient_checkpointing()
    unet.set_adapter("dog")
    loss = unet(**unet_inputs()).sample.square().mean()
    unet.set_adapters(["dog"], [0.5])
    with pytest.raises(RuntimeError, match="adapters were switched between the forward and the backward"):
        loss.backward()


@pytest.mark.parametrize(("name", "blocks"), [("u", 4), ("large", 5)])
def test_an_adapter_that_is_refused_leaves_nothing_behind(name: str, blocks: int) -> None:
    unet = with_two(build())
    before = run(unet)
    with pytest.raises(ValueError, match=r"n_blocks=5|adapter name 'u'"):
        unet.add_adapter(EtherPeftConfig(target_modules=["to_k"], n_blocks=blocks), name)
    assert list(unet.peft_config) == ["dog", "style"]
    assert unet.active_adapters() == ["style"]
    assert torch.equal(run(unet), before)
