"""Every method on one Linear against the paper's formula in dense fp64."""

from __future__ import annotations

from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from helpers import DIRECT, dense_weight, free_lengths, relative_error, shake
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ether_diffusion import Adapter, EtherConfig, attach
from ether_diffusion.core.linear import Projection
from ether_diffusion.core.methods import build_method

KINDS = {
    "ether": {"method": "ether"},
    "ether_plus": {"method": "ether_plus"},
    "one_sided": {"method": "ether_plus", "two_sided": False},
    "naive": {"method": "naive"},
    "anchored": {"method": "anchored"},
}
KIND = pytest.mark.parametrize("kind", KINDS)
BLOCKS = pytest.mark.parametrize("n_blocks", [1, 2, 4])
DTYPE = pytest.mark.parametrize("dtype", list(DIRECT), ids=lambda dtype: str(dtype).removeprefix("torch."))
ARITHMETIC = pytest.mark.parametrize(
    ("dtype", "bias"),
    [
        (torch.float64, True),
        (torch.float32, False),
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float16, True),
    ],
    ids=["fp64, bias", "fp32", "bf16, bias", "bf16", "fp16, bias"],
)
"""Half precision takes the bias another way."""
IN, OUT = 16, 24


class OneLinear(nn.Module):
    """A model with a single projection, so that the whole of it can be written down."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.proj = nn.Linear(IN, OUT, bias=bias)
        shake(self, seed=5, scale=1.0)
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def attached(model: nn.Module, kind: str, n_blocks: int = 2, name: str = "default", seed: int = 1) -> Adapter:
    adapter = attach(model, EtherConfig(**KINDS[kind], n_blocks=n_blocks, targets=("proj",), seed=seed), name)
    shake(adapter, seed)
    return adapter


def vectors(adapter: Adapter) -> dict[str, Tensor]:
    return {key.removeprefix("proj."): parameter for key, parameter in adapter.state_dict(keep_vars=True).items()}


def tokens(dtype: torch.dtype = torch.float64, count: int = 5) -> Tensor:
    return torch.randn(2, count, IN, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


def oracle(model: OneLinear, x: Tensor, strengths: dict[Adapter, float]) -> Tensor:
    """(W + Σ s (W' - W)) x + b, the bias untransformed."""
    weight = model.proj.weight.double()
    total = weight
    for adapter, strength in strengths.items():
        total = total + strength * (dense_weight(weight, vectors(adapter)) - weight)
    bias = 0.0 if model.proj.bias is None else model.proj.bias.double()
    return x.double() @ total.T + bias


@KIND
@pytest.mark.parametrize("n_blocks", [1, 4])
@ARITHMETIC
def test_projection_equals_the_dense_formula(kind: str, n_blocks: int, bias: bool, dtype: torch.dtype) -> None:
    model = OneLinear(bias, dtype)
    adapter = attached(model, kind, n_blocks)
    x = tokens(dtype)
    output, expected = model(x), oracle(model, x, {adapter: 1.0})
    assert output.dtype == dtype
    assert relative_error(output, expected) < DIRECT[dtype]
    assert relative_error(model.proj.weight @ x[0, 0], expected[0, 0]) > 0.1  # the base is far from it


@KIND
@pytest.mark.parametrize(("n_blocks", "strength"), [(1, 0.6), (2, 1.0), (4, 1.0), (4, 0.6)])
def test_gradients_equal_autograd_through_the_dense_formula(kind: str, n_blocks: int, strength: float) -> None:
    model = OneLinear()
    adapter = attached(model, kind, n_blocks).double()
    assert adapter.host is not None
    adapter.host.set_active({"default": strength})
    x = tokens().requires_grad_()
    upstream = torch.randn(2, 5, OUT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = [x, *adapter.parameters()]
    actual = torch.autograd.grad(model(x), inputs, upstream)
    expected = torch.autograd.grad(oracle(model, x, {adapter: strength}), inputs, upstream)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@KIND
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_trainable_base_gets_the_gradients_of_the_dense_formula(kind: str, strength: float) -> None:
    """The bias is subtracted before H⁺_out and added after it: its own gradient is that of an untouched bias."""
    model = OneLinear()
    adapter = attached(model, kind).double()
    assert adapter.host is not None
    adapter.host.set_active({"default": strength})
    model.requires_grad_(True)
    x = tokens()
    inputs = [model.proj.weight, model.proj.bias]
    actual = torch.autograd.grad(model(x).square().sum(), inputs)
    expected = torch.autograd.grad(oracle(model, x, {adapter: strength}).square().sum(), inputs)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@KIND
def test_a_frozen_weight_gets_no_gradient_and_vectors_do(kind: str) -> None:
    model = OneLinear(dtype=torch.float32)
    adapter = attached(model, kind)
    model(tokens(torch.float32)).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in adapter.parameters())


MIXTURES = {
    "one input-sided": [("ether", 0.6)],
    "two input-sided": [("ether", 1.0), ("one_sided", 0.5)],
    "two input-sided, one below 0": [("ether", -0.5), ("one_sided", 0.8)],
    "three input-sided": [("ether", -0.5), ("naive", 0.3), ("one_sided", 1.0)],
    "two-sided below 1": [("ether_plus", 0.7)],
    "two-sided above 1": [("ether_plus", 1.5)],
    "two-sided, twice": [("ether_plus", 1.0), ("ether_plus", 0.5)],
    "the variant below 1": [("anchored", 0.6)],
    "the variant with others": [("anchored", -0.7), ("ether", 0.4), ("anchored", 1.0)],
    "the variant with a two-sided one": [("anchored", 0.7), ("ether_plus", 0.5)],
    "both sorts": [("ether_plus", 1.0), ("ether", 0.4), ("naive", -1.0)],
}


@pytest.mark.parametrize("mixture", MIXTURES)
@ARITHMETIC
def test_mixtures_add_their_delta_weights(mixture: str, bias: bool, dtype: torch.dtype) -> None:
    """Of few tokens and of many, which are taken another way if all parts are reflections."""
    model = OneLinear(bias, dtype)
    strengths = {
        attached(model, kind, name=str(i), seed=i): strength for i, (kind, strength) in enumerate(MIXTURES[mixture])
    }
    host = next(iter(strengths)).host
    assert host is not None
    host.set_active({adapter.adapter_name: strength for adapter, strength in strengths.items()})
    for count in (5, 64):
        x = tokens(dtype, count)
        output = model(x)
        assert output.dtype == dtype
        assert relative_error(output, oracle(model, x, strengths)) < 2 * DIRECT[dtype]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_fused_weight_is_the_dense_sum_and_unfusing_restores_every_bit(mixture: str) -> None:
    model = OneLinear(dtype=torch.float32)
    base = model.proj.weight.clone()
    strengths = {
        attached(model, kind, name=str(i), seed=i): strength for i, (kind, strength) in enumerate(MIXTURES[mixture])
    }
    host = next(iter(strengths)).host
    assert host is not None
    host.set_active({adapter.adapter_name: strength for adapter, strength in strengths.items()})
    expected = base.double()
    for adapter, strength in strengths.items():
        expected = expected + strength * (dense_weight(base, vectors(adapter)) - base.double())
    unfused = model(tokens(torch.float32))
    host.fuse()
    assert relative_error(model.proj.weight, expected) < DIRECT[torch.float32]
    assert relative_error(model(tokens(torch.float32)), unfused) < 2 * DIRECT[torch.float32]
    host.unfuse()
    assert torch.equal(model.proj.weight, base)
    assert torch.equal(model(tokens(torch.float32)), unfused)


@KIND
@DTYPE
def test_delta_weight_equals_the_dense_difference(kind: str, dtype: torch.dtype) -> None:
    model = OneLinear(dtype=dtype)
    (method,) = attached(model, kind).methods().values()
    weight = model.proj.weight
    delta = method.delta_weight(weight)
    assert delta.dtype == torch.promote_types(weight.dtype, torch.float32)
    expected = dense_weight(weight, method.state_dict(keep_vars=True)) - weight.double()
    assert relative_error(delta, expected) < 4 * torch.finfo(torch.float32).eps


@BLOCKS
@pytest.mark.parametrize(
    ("kind", "rank_per_block"), [("ether", 1), ("one_sided", 2), ("ether_plus", 4), ("anchored", 2)]
)
def test_delta_weight_has_the_papers_rank(kind: str, rank_per_block: int, n_blocks: int) -> None:
    (method,) = attached(OneLinear(), kind, n_blocks).methods().values()
    singular = torch.linalg.svdvals(method.delta_weight(OneLinear().proj.weight).double())
    rank = min(rank_per_block * n_blocks, IN)
    assert singular[rank - 1] > 1e-3 * singular[0]
    assert (singular[rank:] < 1e-6 * singular[0]).all()


@BLOCKS
@pytest.mark.parametrize(
    ("kind", "scalars"),
    [("ether", IN), ("ether_plus", 2 * IN + 2 * OUT), ("one_sided", 2 * IN), ("naive", None), ("anchored", IN)],
)
def test_number_of_trained_scalars(kind: str, scalars: int | None, n_blocks: int) -> None:
    adapter = attached(OneLinear(), kind, n_blocks)
    assert adapter.num_parameters() == (IN * IN // n_blocks if scalars is None else scalars)
    rows = {parameter.shape[0] for parameter in adapter.parameters()}
    assert rows == {n_blocks}
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())


@pytest.mark.parametrize("kind", ["ether_plus", "one_sided", "naive", "anchored"])
@DTYPE
def test_all_methods_but_ether_start_as_exactly_the_base(kind: str, dtype: torch.dtype) -> None:
    model, x = OneLinear(dtype=dtype), tokens(dtype)
    base = model(x)
    attach(model, EtherConfig(**KINDS[kind], n_blocks=4, targets=("proj",)))
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("length", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("two_sided", [True, False])
def test_without_the_unit_length_the_vectors_act_as_long_as_they_are(length: float, two_sided: bool) -> None:
    model, x = OneLinear(), tokens(torch.float64)
    config = EtherConfig("ether_plus_free", n_blocks=2, two_sided=two_sided, targets=("proj",))
    adapter = attach(model, config)
    shake(adapter, seed=3)
    with torch.no_grad():
        for vector in adapter.parameters():
            vector *= length
    given = vectors(adapter)
    weight = model.proj.weight.double() @ free_lengths(given["u"], given["v"])
    if two_sided:
        weight = free_lengths(given["u_out"], given["v_out"]) @ weight
    bias = 0 if model.proj.bias is None else model.proj.bias.double()
    assert relative_error(model(x), x @ weight.T + bias) < 1e-6
    (method,) = adapter.methods().values()
    assert relative_error(method.delta_weight(model.proj.weight), weight - model.proj.weight) < 1e-5


def test_of_unit_vectors_the_variant_of_free_lengths_is_ether_plus() -> None:
    found, model, x = [], OneLinear(), tokens(torch.float64)
    for kind in ("ether_plus", "ether_plus_free"):
        adapter = attach(model, EtherConfig(kind, n_blocks=4, targets=("proj",)))
        shake(adapter, seed=3)
        with torch.no_grad():
            for vector in adapter.parameters():
                vector /= vector.norm(dim=-1, keepdim=True)
        found.append(model(x))
        adapter.detach()
    assert relative_error(*found) < 1e-6


def test_ether_starts_as_reflections_at_full_distance() -> None:
    model = OneLinear()
    adapter = attach(model, EtherConfig("ether", n_blocks=4, targets=("proj",)))
    (method,) = adapter.methods().values()
    eye = torch.eye(IN)
    assert method.input_delta(eye).norm().item() == pytest.approx(4.0, rel=1e-6)  # 2 √4


@KIND
@DTYPE
def test_autocast_errs_by_roundings_of_its_own_precision(kind: str, dtype: torch.dtype) -> None:
    model = OneLinear(dtype=dtype)
    adapter = attached(model, kind)
    x = tokens(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    assert relative_error(output, oracle(model, x, {adapter: 1.0})) < DIRECT[torch.bfloat16]


HALVES = pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=["bf16", "fp16", "fp32 under autocast", "bf16 under autocast"],
)
COUNT = pytest.mark.parametrize("count", [4, 64], ids=["few tokens", "many tokens"])
REFLECTIONS = pytest.mark.parametrize("kind", ["ether", "one_sided", "ether_plus", "anchored"])


@REFLECTIONS
@COUNT
@HALVES
def test_gradients_in_half_precision_err_by_roundings(
    kind: str, count: int, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    """Against autograd through the dense fp64 formula; vectors may be off by what one rounding of each term makes."""
    model = OneLinear(dtype=dtype)
    adapter = attached(model, kind)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    pull = torch.randn(count, OUT, generator=generator, dtype=torch.float64)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        output = model(x)
    (output.double() * pull).sum().backward()
    exact = {name: value.detach().double().requires_grad_() for name, value in vectors(adapter).items()}
    exact_x = x.detach().double().requires_grad_()
    total = exact_x @ dense_weight(model.proj.weight.double(), exact).T
    (total * pull).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert relative_error(x.grad, exact_x.grad) < DIRECT[autocast or dtype]  # type: ignore[arg-type]
    for name, parameter in adapter.methods()["proj"].named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert relative_error(parameter.grad, exact[name].grad) < 2 * DIRECT[autocast or dtype], name  # type: ignore[arg-type]


class Widest(TorchDispatchMode):
    """The largest tensor of a wider dtype than half precision that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, Tensor) and each.dtype.itemsize > 2:
                self.numel = max(self.numel, each.numel())
        return found


@REFLECTIONS
@HALVES
@pytest.mark.parametrize("ratio", [0.5, float("inf")], ids=["by the weight", "by the tokens"])
def test_in_half_precision_no_activation_is_widened(
    kind: str, dtype: torch.dtype, autocast: torch.dtype | None, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what a step in bf16 is fast by: passes over activations in fp32 would cost more than the base's matmul."""
    monkeypatch.setattr("ether_diffusion.core.weights.TOKENS_TO_FEATURES", ratio)
    model = OneLinear(dtype=dtype)
    attached(model, kind)
    trains = dtype != torch.float16  # there gradients need the range of fp32
    x = torch.ones(64, IN, dtype=dtype, requires_grad=trains and dtype != torch.float32)  # its gradient is of its dtype
    enabled = torch.autocast("cpu", dtype=autocast, enabled=autocast is not None)
    with torch.set_grad_enabled(trains), Widest() as widest, enabled:
        output = model(x)
    if trains:
        with widest:
            output.backward(torch.ones_like(output))
    assert 0 < widest.numel < x.numel()


@pytest.mark.parametrize("count", [256, 4096])
def test_a_bias_costs_half_precision_no_digits(count: int) -> None:
    """Nor does a gradient with a mean: sums over all tokens, and over the bias for each, must not cancel."""
    model = OneLinear(dtype=torch.bfloat16)
    with torch.no_grad():
        model.proj.bias.mul_(10)
    adapter = attached(model, "ether_plus")
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, IN, generator=generator, dtype=torch.float64).to(torch.bfloat16)
    pull = (torch.randn(count, OUT, generator=generator, dtype=torch.float64) + 0.3).to(torch.bfloat16)
    for ratio in (0.5, float("inf")):
        with mock.patch("ether_diffusion.core.weights.TOKENS_TO_FEATURES", ratio):
            adapter.zero_grad()
            model(x).backward(pull)
        exact = {name: value.detach().double().requires_grad_() for name, value in vectors(adapter).items()}
        (x.double() @ dense_weight(model.proj.weight.double(), exact).T * pull.double()).sum().backward()
        for name, parameter in vectors(adapter).items():
            assert relative_error(parameter.grad, exact[name].grad) < 0.03, (name, ratio)  # type: ignore[arg-type]


def test_gradients_in_fp16_have_the_range_of_fp32() -> None:
    """A scaler of losses lowers its scale until the sums over all tokens fit: here they would not by far."""
    model = OneLinear(dtype=torch.float16)
    adapter = attached(model, "ether_plus")
    model(torch.ones(4096, IN, dtype=torch.float16)).backward(torch.full((4096, OUT), 1000.0, dtype=torch.float16))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    assert max(p.grad.abs().max() for p in adapter.parameters() if p.grad is not None) > torch.finfo(torch.float16).max


def test_methods_without_an_output_side_say_so() -> None:
    for kind in ("ether", "naive", "one_sided"):
        method = build_method(EtherConfig(**KINDS[kind]), IN, OUT, torch.Generator())
        assert not method.two_sided
        with pytest.raises(TypeError, match="does not transform the output side"):
            method.output_delta(torch.zeros(1, OUT), None)


def test_every_mixture_costs_one_matmul_and_thin_products() -> None:
    class Counting(nn.Linear):
        rows: ClassVar[list[int]] = []

        def forward(self, x: Tensor) -> Tensor:
            Counting.rows.append(x.shape[:-1].numel())
            return super().forward(x)

    model = OneLinear(dtype=torch.float32)
    model.proj = Counting(IN, OUT)
    x = torch.randn(1, 50, IN)
    for kinds, thin in (["ether_plus"], 0), (["ether", "naive", "one_sided"], 0), (["ether_plus", "ether"], 2):
        found = [attached(model, kind, name=kind) for kind in kinds]
        Counting.rows.clear()
        model(x)
        assert Counting.rows[0] == 50
        assert len(Counting.rows) == 1 + thin, kinds
        assert all(count <= 8 for count in Counting.rows[1:])  # the rows of an update, not the tokens
        for adapter in found:
            adapter.detach()


def test_removed_hooks_leave_the_module_as_it_was() -> None:
    linear = nn.Linear(IN, OUT)
    before = {key: dict(value) if isinstance(value, dict) else value for key, value in linear.__dict__.items()}
    Projection("proj", linear).remove()
    after = {key: dict(value) if isinstance(value, dict) else value for key, value in linear.__dict__.items()}
    assert after == before


@pytest.mark.parametrize(("count", "kept"), [(512, False), (1, True)])
def test_no_output_is_kept_where_tokens_are_many(count: int, kept: bool) -> None:
    """The update is of low rank then: of the activations x alone is kept, and its coefficients."""
    model = OneLinear(dtype=torch.float32)
    attached(model, "ether_plus")
    x = torch.randn(1, count, IN, requires_grad=True)
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert ((1, count, OUT) in shapes) == kept
    assert (1, count, IN) in shapes


@KIND
@pytest.mark.parametrize("count", [4, 20], ids=["on the activations", "low rank"])
def test_second_derivatives_of_a_whole_projection(kind: str, count: int) -> None:
    model = OneLinear()
    adapter = attached(model, kind).double()
    x = torch.randn(1, count, IN, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()
    inputs = [x, *adapter.parameters()]

    def project(*_: Tensor) -> Tensor:
        return model(x)

    assert torch.autograd.gradgradcheck(project, inputs, atol=1e-6)


@pytest.mark.parametrize("count", [1, 200], ids=["on the activations", "low rank"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@KIND
def test_few_and_many_tokens_give_the_dense_formula(kind: str, count: int, layout: str) -> None:
    model = OneLinear()
    adapter = attached(model, kind).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(IN, count, generator=generator, dtype=torch.float64).T[None]
    x = (x.contiguous() if layout == "contiguous" else x).requires_grad_()
    upstream = torch.randn(1, count, OUT, generator=generator, dtype=torch.float64)
    inputs = [x, *adapter.parameters()]
    output, expected = model(x), oracle(model, x, {adapter: 1.0})
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-11)
    for got, want in zip(
        torch.autograd.grad(output, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
