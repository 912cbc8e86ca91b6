"""A batch whose samples have adapters of their own: every sample as in a run of its adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from helpers import shake, unet_inputs
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion import Adapter, EtherConfig
from ether_diffusion.core.host import Host, host_of
from ether_diffusion.core.targets import find_targets
from ether_diffusion.playground.tiny import tiny_unet

CONFIGS = {
    "ether": EtherConfig("ether", n_blocks=2),
    "ether_plus": EtherConfig("ether_plus"),
    "one_sided": EtherConfig("ether_plus", two_sided=False, n_blocks=1),
    "anchored": EtherConfig("anchored"),
}
KIND = pytest.mark.parametrize("kind", CONFIGS)
NAMES = ("dog", "cat")


ONE_BLOCK = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
"""A UNet with attention in the middle alone: a compiler takes a minute over the others."""


def adapted(
    config: EtherConfig, names: Sequence[str] = NAMES, double: bool = False, settings: dict[str, Any] | None = None
) -> tuple[nn.Module, Host]:
    """A UNet whose projections all have biases that matter, with an adapter for each name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet: UNet2DConditionModel = tiny_unet(**settings or {}).requires_grad_(False).eval()
    for target in find_targets(unet):
        target.module.bias = nn.Parameter(torch.linspace(-1, 1, target.out_features), requires_grad=False)
    for i, name in enumerate(names):
        shake(ether.attach(unet, config, name), seed=i)
    host = host_of(unet)
    assert host is not None
    if double:
        unet.double()
        for adapter in host.adapters.values():
            adapter.double()
    return unet, host


def inputs(batch: int, double: bool = False) -> dict[str, Any]:
    found = unet_inputs(batch=batch)
    return {k: v.double() if double and v.is_floating_point() else v for k, v in found.items()}


def part(given: dict[str, Any], i: int) -> dict[str, Any]:
    return {key: value[i : i + 1] for key, value in given.items()}


def gradients(adapter: Adapter) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in adapter.parameters()]


@KIND
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", [3, 6])
def test_every_sample_and_every_gradient_is_that_of_the_adapter_alone(
    kind: str, checkpointing: bool, batch: int
) -> None:
    unet, host = adapted(CONFIGS[kind], double=True)
    names = ["cat", None, "dog"]
    given = inputs(batch, double=True)
    expected = []
    for i in range(batch):
        name = names[i % 3]
        host.set_active({name: 1.0} if name else {})
        sample = unet(**part(given, i)).sample
        expected.append(sample.detach())
        if sample.requires_grad:
            sample.square().sum().backward()
    wanted = {name: gradients(host.adapters[name]) for name in NAMES}
    for adapter in host.adapters.values():
        adapter.zero_grad()

    if checkpointing:
        unet.train()
        unet.enable_gradient_checkpointing()
    host.set_per_sample(names)
    found = unet(**given).sample
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-9)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    found.square().sum().backward()
    for name in NAMES:
        for got, want in zip(gradients(host.adapters[name]), wanted[name], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@KIND
def test_an_adapter_that_no_sample_has_gets_no_gradient(kind: str) -> None:
    unet, host = adapted(CONFIGS[kind])
    host.set_per_sample(["dog", "dog"])
    unet(**inputs(2)).sample.sum().backward()
    assert all(p.grad is None for p in host.adapters["cat"].parameters())
    assert all(p.grad is not None and p.grad.norm() > 0 for p in host.adapters["dog"].parameters())


@pytest.mark.parametrize("names", [["cat", "dog"], ["cat", None]], ids=["all", "with the base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_the_adapter_alone(dtype: torch.dtype, names: list[str | None]) -> None:
    unet, host = adapted(CONFIGS["ether_plus"])
    unet.to(dtype)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(2).items()}

    def gradient(name: str) -> Tensor:
        found = torch.cat([p.grad.flatten() for p in host.adapters[name].parameters() if p.grad is not None])
        host.adapters[name].zero_grad()
        return found

    host.set_per_sample(names)
    found = unet(**given).sample
    assert found.dtype == dtype
    (100 * found.float()).square().sum().backward()
    together = [None if name is None else gradient(name) for name in names]
    for i, name in enumerate(names):
        host.set_active({} if name is None else {name: 1.0})
        alone = unet(**part(given, i)).sample
        error = (found[i] - alone[0]).abs().max() / alone.abs().max()
        assert error < 16 * torch.finfo(dtype).eps
        if name is not None:
            (100 * alone.float()).square().sum().backward()
            own = gradient(name)
            mine = together[i]
            assert mine is not None
            assert (mine - own).norm() < 32 * torch.finfo(dtype).eps * own.norm()


@pytest.mark.parametrize("tokens", [5, 64], ids=["on the activations", "low rank"])
def test_a_part_of_the_model_called_alone_and_a_compiled_one_know_their_samples(tokens: int) -> None:
    unet, host = adapted(CONFIGS["ether_plus"])
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(1))
    host.set_active({"dog": 1.0})
    expected = attention(x[1:])
    host.set_per_sample([None, "dog"])
    torch.testing.assert_close(attention(x)[1:], expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[1:], expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("names", [["cat", None, "dog"], None], ids=["of each sample", "of all"])
def test_a_whole_model_compiles_as_one_graph(names: list[str | None] | None) -> None:
    (unet, host), (twin, other) = (adapted(CONFIGS["ether_plus"], settings=ONE_BLOCK) for _ in range(2))
    for each in (host, other):
        if names is None:
            each.set_active({"dog": 1.0})
        else:
            each.set_per_sample(names)
    given = inputs(2 * len(names or [0]))
    torch.compiler.reset()
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    found, expected = compiled(**given).sample, twin(**given).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().mean().backward()
    expected.square().mean().backward()
    for name in NAMES:
        got, want = gradients(host.adapters[name]), gradients(other.adapters[name])
        assert sum(g.norm() for g in want) > 0 or (name == "cat" and names is None)
        for one, two in zip(got, want, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(unet(**given).sample, expected, rtol=1e-4, atol=1e-5)  # by what it noted
    torch.compiler.reset()


def picture(pipe: DiffusionPipeline, prompts: list[str], guidance: float, images: int, first: int = 0) -> Tensor:
    generators = [torch.Generator().manual_seed(first + i) for i in range(len(prompts) * images)]
    return pipe(
        prompts,
        num_inference_steps=2,
        guidance_scale=guidance,
        num_images_per_prompt=images,
        generator=generators,
        output_type="pt",
    ).images


def with_adapters(pipe: DiffusionPipeline, components: Sequence[str] = ("unet", "text_encoder")) -> DiffusionPipeline:
    for seed, name in enumerate(NAMES):
        for component in components:
            shake(ether.attach(getattr(pipe, component), name=name), seed)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("images", [1, 2])
def test_a_pipeline_draws_each_prompt_with_its_own_adapter(
    pipe: DiffusionPipeline, guidance: float, images: int
) -> None:
    """Guidance doubles the batch and images per prompt repeat it; the text encoder has adapters as well."""
    with_adapters(pipe)
    names, prompts = ["dog", None, "cat"], ["a dog", "a robot", "a cat"]
    ether.set_adapters(pipe, per_sample=names, images_per_prompt=images)
    assert [name for name, info in ether.adapters(pipe).items() if info.active] == ["dog", "cat"]
    together = picture(pipe, prompts, guidance, images)
    for i, name in enumerate(names):
        ether.set_adapters(pipe, [name] if name else [])
        alone = picture(pipe, [prompts[i]], guidance, images, first=i * images)
        torch.testing.assert_close(together[i * images : (i + 1) * images], alone, rtol=0, atol=1e-4)
    assert (together[0] - together[-1]).abs().max() > 0.01


def test_samples_have_the_base_in_components_that_their_adapter_lacks(pipe: DiffusionPipeline) -> None:
    shake(ether.attach(pipe.unet, name="dog"), 1)
    shake(ether.attach(pipe.unet, name="cat"), 2)
    shake(ether.attach(pipe.text_encoder, name="cat"), 3)
    ether.set_adapters(pipe, per_sample=["dog", "cat"])
    together = picture(pipe, ["a", "b"], 4.0, 1)
    for i, name in enumerate(["dog", "cat"]):
        ether.set_adapters(pipe, name)
        torch.testing.assert_close(together[i], picture(pipe, [["a", "b"][i]], 4.0, 1, first=i)[0], rtol=0, atol=1e-4)


def test_a_batch_of_another_size_is_refused() -> None:
    unet, host = adapted(CONFIGS["ether_plus"])
    host.set_per_sample(["dog", None])
    for batch in (1, 3, 8):
        with pytest.raises(ValueError, match=f"per_sample names 2 adapters, but .* got a batch of {batch}"):
            unet(**inputs(batch))
    empty = torch.zeros(0, 5, 64)
    with pytest.raises(ValueError, match="got a batch of 0"):
        unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q(empty)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_sample": ["dog", "bird"]}, "no adapter 'bird' is loaded; there are: dog, cat"),
        ({"per_sample": []}, "per_sample is empty"),
        ({"per_sample": ["dog"], "images_per_prompt": 0}, "images_per_prompt must be at least 1"),
        ({"names": "dog", "per_sample": ["dog"]}, "not both"),
        ({"strengths": 0.5, "per_sample": ["dog"]}, "act at strength 1"),
        ({"per_sample": ["dog", "coarse"]}, "must have the same settings: 'dog' has .*n_blocks=4.*'coarse' has"),
        ({"per_sample": ["naive"]}, "'naive' is a Naive adapter"),
        ({}, "name the adapters to set"),
    ],
)
def test_wrong_calls_are_refused_and_change_nothing(
    pipe: DiffusionPipeline, arguments: dict[str, Any], message: str
) -> None:
    with_adapters(pipe, ["unet"])
    if "coarse" in str(arguments):
        ether.attach(pipe.unet, EtherConfig(n_blocks=1), name="coarse")
    if "naive" in str(arguments):
        ether.attach(pipe.unet, EtherConfig("naive"), name="naive")
    before = ether.adapters(pipe)
    with pytest.raises(ValueError, match=message):
        ether.set_adapters(pipe, **arguments)
    assert ether.adapters(pipe) == before


def test_the_seed_alone_may_differ() -> None:
    unet, host = adapted(CONFIGS["ether_plus"])
    ether.attach(unet, EtherConfig(seed=7), "bird")
    host.set_per_sample(["dog", "bird"])
    assert host.strengths == {"dog": 1.0, "bird": 1.0}


def test_fusing_is_refused_and_what_comes_and_goes_keeps_the_samples(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    with_adapters(pipe, ["unet"])
    ether.save(pipe, tmp_path, "dog")
    ether.set_adapters(pipe, per_sample=["dog", "cat"])
    with pytest.raises(ValueError, match="each sample has an adapter of its own"):
        ether.fuse(pipe)
    before = picture(pipe, ["a", "b"], 4.0, 1)
    ether.load(pipe, tmp_path, name="new")
    assert not ether.adapters(pipe)["new"].active
    assert torch.equal(picture(pipe, ["a", "b"], 4.0, 1), before)
    ether.unload(pipe, "new")
    assert torch.equal(picture(pipe, ["a", "b"], 4.0, 1), before)
    with ether.disabled(pipe):
        base = picture(pipe, ["a", "b"], 4.0, 1)
    assert torch.equal(picture(pipe, ["a", "b"], 4.0, 1), before)
    ether.unload(pipe, "cat")  # no sample may silently go on with another
    assert not any(info.active for info in ether.adapters(pipe).values())
    assert torch.equal(picture(pipe, ["a", "b"], 4.0, 1), base)
