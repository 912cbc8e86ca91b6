"""A projection that its owner calls: the same as one with hooks, under a plan for that call alone."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import DIRECT, dense_weight, relative_error, shake
from torch import Tensor, nn

from ether_diffusion import EtherConfig
from ether_diffusion.core.linear import Projection
from ether_diffusion.core.methods import Method, Reflection, build_method
from ether_diffusion.core.plan import Mixture, Off, PerSample, Plan, SampleNames

CONFIGS = {
    "ether": EtherConfig("ether", n_blocks=2),
    "ether_plus": EtherConfig("ether_plus"),
    "one_sided": EtherConfig("ether_plus", two_sided=False, n_blocks=1),
    "anchored": EtherConfig("anchored"),
    "naive": EtherConfig("naive"),
}
WIDE, NARROW = 24, 16


def methods(kind: str, count: int = 2) -> list[Method]:
    found = []
    for seed in range(count):
        method = build_method(CONFIGS[kind], NARROW, WIDE, torch.Generator().manual_seed(seed))
        shake(method, seed)
        found.append(method)
    return found


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(NARROW, WIDE).requires_grad_(False).to(dtype)


def given(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, rows, NARROW, generator=torch.Generator().manual_seed(5)).to(dtype)


def dense(module: nn.Linear, parts: list[tuple[Method, float]], x: Tensor) -> Tensor:
    weight = module.weight.double()
    total = weight + sum(s * (dense_weight(weight, m.state_dict(keep_vars=True)) - weight) for m, s in parts)
    return x.double() @ total.T + module.bias.double()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", DIRECT)
@pytest.mark.parametrize("strengths", [(1.0,), (0.5,), (1.0, -0.7)])
@pytest.mark.parametrize("rows", [2, 200])
def test_a_call_under_a_mixture_is_dense(
    kind: str, dtype: torch.dtype, strengths: tuple[float, ...], rows: int
) -> None:
    module, x = linear(dtype), given(rows, dtype)
    parts = list(zip(methods(kind), strengths, strict=False))
    owned = Projection("x", module, hooked=False)
    tolerance = 2 * DIRECT[dtype]
    for arguments in (((x,), {}), ((), {"input": x})):
        found = owned.run(Mixture(tuple(parts), 0), *arguments[0], **arguments[1])
        assert relative_error(found, dense(module, parts, x)) < tolerance
    assert torch.equal(owned.run(Off(), x), module(x))


@pytest.mark.parametrize("kind", ["ether", "ether_plus", "one_sided", "anchored"])
def test_a_call_under_a_plan_per_sample_is_dense(kind: str) -> None:
    module, x, (one, other) = linear(), given(4), methods(kind)
    assert isinstance(one, Reflection)
    assert isinstance(other, Reflection)
    plan = PerSample((other, one), SampleNames(("b", None, "a")), 0)
    found = Projection("x", module, hooked=False).run(plan, x)
    rows = [dense(module, [(other, 1.0)], x[0]), dense(module, [], x[1]), dense(module, [(one, 1.0)], x[2])]
    assert relative_error(found, torch.stack(rows)) < DIRECT[torch.float32]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("rows", [2, 200])
def test_gradients_are_those_of_the_hooks_bit_for_bit(kind: str, rows: int) -> None:
    results = []
    for hooked in (False, True):
        module, x, own = linear(), given(rows).requires_grad_(), methods(kind, 1)
        plan = Mixture(((own[0], 1.0),), 0)
        projection = Projection("x", module, hooked=hooked)
        projection.plan = plan
        output = module(x) if hooked else projection.run(plan, x)
        gradients = torch.autograd.grad(output.square().mean(), [x, *own[0].parameters()])
        results.append([output.detach(), *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_it_leaves_no_hook_and_keeps_no_plan() -> None:
    module, (one, _) = linear(), methods("ether_plus")
    projection = Projection("x", module, hooked=False)
    projection.run(Mixture(((one, 1.0),), 0), given(2))
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    assert isinstance(projection.plan, Off)


def test_a_users_hook_that_keeps_the_output_is_not_written_over() -> None:
    """One hook on a projection with hooks is our own; on one that its owner calls it is somebody else's."""
    for rows in (2, 200):
        module, kept = linear(), []
        module.register_forward_hook(lambda _, __, output, kept=kept: kept.append((output, output.clone())))
        for kind in ("ether", "ether_plus"):
            plan = Mixture(((methods(kind, 1)[0], 1.0),), 0)
            Projection("x", module, hooked=False).run(plan, given(rows))
        assert all(torch.equal(output, copy) for output, copy in kept)


def test_threads_with_plans_of_their_own_share_a_projection() -> None:
    module, x, own = linear(), given(50), methods("ether_plus", 3)
    projection = Projection("x", module, hooked=False)
    plans: list[Plan] = [Mixture(((method, 1.0),), 0) for method in own]
    expected = [dense(module, [(method, 1.0)], x) for method in own]
    wrong: list[int] = []

    def serve(number: int) -> None:
        for _ in range(50):
            if relative_error(projection.run(plans[number], x), expected[number]) > 1e-5:
                wrong.append(number)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_methods_keep_their_vectors_in_fp32_wherever_they_are_and_whatever_the_default_is(
    kind: str, dtype: torch.dtype
) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        (method,) = methods(kind, 1)
    finally:
        torch.set_default_dtype(default)
    beside = nn.ModuleDict({"method": method, "linear": linear()}).to(dtype)
    assert {parameter.dtype for parameter in method.parameters()} == {torch.float32}
    assert beside["linear"].weight.dtype == dtype
    method.double()
    assert {parameter.dtype for parameter in method.parameters()} == {torch.float64}
