"""Fused Linears: each part has vectors of its own, in every way that a plan is applied; against dense fp64 matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttention
from helpers import dense_weight, replace_weights, shake, vectors_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ether_diffusion import Adapter, EtherConfig, attach
from ether_diffusion.core.adapter import check_blocks
from ether_diffusion.core.host import Host, attach_made, host_of
from ether_diffusion.core.targets import find_targets, find_targets_of_0_1

WIDTH, MLP = 24, 60
QKV_MLP, OUT = "attn.to_qkv_mlp_proj", "attn.to_out"
KINDS: dict[str, dict[str, Any]] = {
    "ether": {"method": "ether"},
    "ether_plus": {"method": "ether_plus"},
    "one_sided": {"method": "ether_plus", "two_sided": False},
    "anchored": {"method": "anchored"},
    "naive": {"method": "naive"},
}
KIND = pytest.mark.parametrize("kind", KINDS)
PARTS = pytest.mark.parametrize("targets", ["attention", "all"])


class Single(nn.Module):
    """The attention of a single block of FLUX.2: a Linear to q, k, v (24 each) and MLP (120), one from (24, 60)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Flux2ParallelSelfAttention(
            WIDTH, heads=2, dim_head=12, out_dim=WIDTH, mlp_ratio=MLP / WIDTH, bias=True, out_bias=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


def single(dtype: torch.dtype = torch.float64) -> Single:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Single().requires_grad_(False).eval().to(dtype)


def adapted(kind: str, targets: str = "all", count: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Single, Host]:
    model = single(dtype)
    for seed in range(count):
        adapter = attach(model, EtherConfig(n_blocks=4, targets=targets, seed=seed, **KINDS[kind]), "abc"[seed])
        shake(adapter.to(dtype), seed=seed + 1)
    host = host_of(model)
    assert host is not None
    return model, host


def tokens(number: int, batch: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, number, WIDTH, generator=torch.Generator().manual_seed(3), dtype=dtype)


def close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)


def test_every_part_has_its_key_and_its_shape() -> None:
    shapes = {
        key: tuple(value.shape) for key, value in attach(single(), EtherConfig(targets="all")).state_dict().items()
    }
    expected = {f"{QKV_MLP}.{vector}": (4, 6) for vector in "uv"} | {f"{OUT}.{vector}_out": (4, 6) for vector in "uv"}
    for vector in "uv":
        expected |= {f"{QKV_MLP}.{vector}_out.{part}": (4, width) for part, width in zip("qkv", (6,) * 3, strict=True)}
        expected |= {f"{QKV_MLP}.{vector}_out.mlp": (4, 30)}
        expected |= {f"{OUT}.{vector}.attention": (4, 6), f"{OUT}.{vector}.mlp": (4, 15)}
    assert shapes == expected


def test_attention_has_no_vectors_for_the_parts_of_the_mlp() -> None:
    whole, attention = (attach(single(), EtherConfig(targets=targets)).state_dict() for targets in ("all", "attention"))
    assert attention.keys() == {key for key in whole if not key.endswith(".mlp")}


@KIND
@PARTS
@pytest.mark.parametrize("number", [3, 400], ids=["few tokens", "many tokens"])
def test_projections_and_gradients_are_those_of_the_dense_weights(kind: str, targets: str, number: int) -> None:
    model, host = adapted(kind, targets)
    adapter = host.adapters["a"]
    for path in (QKV_MLP, OUT):
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(1, number, linear.in_features, generator=generator, dtype=torch.float64)
        grad = torch.randn(1, number, linear.out_features, generator=generator, dtype=torch.float64)
        own = vectors_of(adapter, path)
        inputs = [x.clone().requires_grad_(), *(value for value in own.values() if value.requires_grad)]
        found = linear(inputs[0])
        copies = {key: value.detach().clone().requires_grad_(value.requires_grad) for key, value in own.items()}
        twins = [x.clone().requires_grad_(), *(value for value in copies.values() if value.requires_grad)]
        expected = F.linear(twins[0], dense_weight(linear.weight, copies), linear.bias)
        close(found, expected)
        for mine, other in zip(
            torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, twins, grad), strict=True
        ):
            close(mine, other)


@KIND
@pytest.mark.parametrize("strengths", [{"a": 1.0}, {"a": 0.4}, {"a": 1.0, "b": -0.7}], ids=str)
@pytest.mark.parametrize("number", [5, 300])
def test_strengths_mixtures_and_fusing_are_sums_of_dense_updates(
    kind: str, strengths: dict[str, float], number: int
) -> None:
    model, host = adapted(kind, count=2)
    twin = copy.deepcopy(single())
    replace_weights(twin, {host.adapters[name]: strength for name, strength in strengths.items()})
    host.set_active(strengths)
    x, before = tokens(number), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        close(model(x), twin(x))
        host.fuse()
        close(model(x), twin(x))
        host.unfuse()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_parts_of_two_presets_mix() -> None:
    model = single()
    for seed, targets in enumerate(("attention", "all")):
        shake(attach(model, EtherConfig(targets=targets), targets).double(), seed=seed)
    host, twin = host_of(model), single()
    assert host is not None
    replace_weights(twin, dict.fromkeys(host.adapters.values(), 1.0))
    with torch.no_grad():
        close(model(tokens(7)), twin(tokens(7)))


@pytest.mark.parametrize("kind", ["ether", "ether_plus", "one_sided", "anchored"])
@pytest.mark.parametrize("number", [5, 300])
def test_samples_have_the_parts_of_their_own_adapters(kind: str, number: int) -> None:
    model, host = adapted(kind, count=2)
    host.set_per_sample(["b", None, "a"])
    x, expected = tokens(number, batch=3), []
    for sample, name in zip(x, ("b", None, "a"), strict=True):
        twin = single()
        replace_weights(twin, {} if name is None else {host.adapters[name]: 1.0})
        expected.append(twin(sample[None]))
    with torch.no_grad():
        close(model(x), torch.cat(expected))


@pytest.mark.parametrize("kind", ["ether_plus", "ether"])
def test_compiled_code_reads_parts_and_traces_nothing_again(kind: str) -> None:
    torch.compiler.reset()
    model, host = adapted(kind, count=2, dtype=torch.float32)
    twin, other = adapted(kind, count=2, dtype=torch.float32)
    for each in (host, other):
        for adapter in each.adapters.values():
            adapter.requires_grad_(False)
    counter, x = CompileCounterWithBackend("aot_eager"), tokens(9, dtype=torch.float32)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True), torch.no_grad():
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        compiled(x)
        warm = counter.frame_count
        for strengths in ({"a": 1.0}, {"b": 0.5}, {"a": 1.0, "b": -0.3}, {}):
            host.set_active(strengths)
            other.set_active(strengths)
            torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == warm
    torch.compiler.reset()


def test_compiled_training_has_the_gradients_of_parts() -> None:
    torch.compiler.reset()
    model, host = adapted("ether_plus")
    twin, other = adapted("ether_plus")
    torch.compile(model, backend="aot_eager")(tokens(9)).square().sum().backward()
    twin(tokens(9)).square().sum().backward()
    mine, theirs = (dict(each.adapters["a"].named_parameters()) for each in (host, other))
    for key, parameter in mine.items():
        assert parameter.grad is not None
        close(parameter.grad, theirs[key].grad)  # type: ignore[arg-type]
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("kind", "ranks"), [("ether", (4, 8)), ("ether_plus", (8 + 4 * 8, 2 * 8 + 8)), ("anchored", (8, 16))]
)
def test_the_rank_of_a_layer_counts_its_parts(kind: str, ranks: tuple[int, int]) -> None:
    model, host = adapted(kind)
    adapter = host.adapters["a"]
    assert adapter.ranks() == dict(zip((QKV_MLP, OUT), ranks, strict=True))
    for path, rank in adapter.ranks().items():
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        delta = dense_weight(weight, vectors_of(adapter, path)) - weight
        assert torch.linalg.matrix_rank(delta) == min(rank, WIDTH)


@pytest.mark.parametrize(
    ("n_blocks", "targets", "message"),
    [
        (16, ("to_out",), r"n_blocks=16 does not divide the 24 features of attn\.to_out; .*: 1, 2, 3, 4, 6, 12$"),
        (5, "attention", r"n_blocks=5 does not divide the 24 features of attn\.to_out; .*: 1, 2, 3, 4, 6, 8, 12, 24$"),
        (
            8,
            "all",
            r"n_blocks=8 does not divide the 60 features of attn\.to_out, input part mlp; .*: 1, 2, 3, 4, 6, 12$",
        ),
    ],
)
def test_n_blocks_must_divide_every_part(n_blocks: int, targets: str | tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(single(), EtherConfig(n_blocks=n_blocks, targets=targets))


def test_the_part_of_an_output_is_named() -> None:
    model = Flux2ParallelSelfAttention(16, heads=2, dim_head=8, out_dim=16, mlp_ratio=1.25)
    with pytest.raises(ValueError, match=r"the 40 features of to_qkv_mlp_proj, output part mlp; .*: 1, 2, 4, 8$"):
        attach(model, EtherConfig(n_blocks=16, targets=("to_qkv_mlp_proj",)))


def test_only_sides_that_are_transformed_must_be_divided() -> None:
    targets = find_targets(single(), ("to_qkv_mlp_proj",))
    check_blocks(targets, EtherConfig("ether", n_blocks=8))
    check_blocks(targets, EtherConfig(n_blocks=24, two_sided=False))


def test_adapters_of_other_projections_share_no_batch() -> None:
    model, host = adapted("ether_plus", "attention")
    config, older = EtherConfig(n_blocks=4, targets="attention"), find_targets_of_0_1(model)
    attach_made(model, Adapter(config, older, "old"), older)
    with pytest.raises(ValueError, match=r"'a' and 'old' do not: one of them was trained with version 0\.1"):
        host.set_per_sample(["a", "old"])


def test_a_lora_around_a_fused_linear_hides_no_part() -> None:
    import peft

    model = single(torch.float32)
    before = {target.path: (target.inputs, target.outputs) for target in find_targets(model, "all")}
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_qkv_mlp_proj", "to_out"]), model)
    assert {target.path: (target.inputs, target.outputs) for target in find_targets(model, "all")} == before
