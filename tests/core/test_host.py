"""attach, detach and everything that may happen to a model in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from helpers import DIRECT, dense_weight, relative_error, replace_weights, shake, unet_inputs, vectors_of
from peft import LoraConfig
from torch import Tensor, nn

from ether_diffusion import Adapter, EtherConfig, attach
from ether_diffusion.core.host import host_of
from ether_diffusion.core.targets import find_targets
from ether_diffusion.playground.tiny import tiny_unet

KINDS = {
    "ether": EtherConfig("ether", n_blocks=2),
    "ether_plus": EtherConfig("ether_plus"),
    "one_sided": EtherConfig("ether_plus", two_sided=False, n_blocks=1),
    "anchored": EtherConfig("anchored"),
    "naive": EtherConfig("naive"),
}
KIND = pytest.mark.parametrize("kind", KINDS)
MODEL = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Relative error of a whole small UNet, some twenty layers deep, against the same arithmetic in fp32."""


def build_unet() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_unet().requires_grad_(False).eval()


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return build_unet()


@torch.no_grad()
def run(unet: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in unet_inputs().items()}
    return unet(**inputs).sample


def shaken(model: nn.Module, kind: str = "ether_plus", name: str = "default", seed: int = 1) -> Adapter:
    adapter = attach(model, KINDS[kind], name)
    shake(adapter, seed)
    return adapter


def traces(model: nn.Module) -> dict[str, Any]:
    """What an adapter could leave behind in any module: attributes, and the hooks among them."""
    return {
        path: {key: dict(value) if isinstance(value, dict) else id(value) for key, value in module.__dict__.items()}
        for path, module in model.named_modules()
    }


@KIND
def test_adapted_unet_equals_one_with_dense_weights(unet: UNet2DConditionModel, kind: str) -> None:
    adapter = shaken(unet, kind)
    dense = build_unet()
    replace_weights(dense, {adapter: 1.0})
    assert relative_error(run(unet), run(dense)) < MODEL[torch.float32]
    assert relative_error(run(unet), run(build_unet())) > 1e-2


@KIND
def test_detaching_leaves_no_trace(unet: UNet2DConditionModel, kind: str) -> None:
    before, output, state = traces(unet), run(unet), {k: v.clone() for k, v in unet.state_dict().items()}
    adapter = shaken(unet, kind)
    second = shaken(unet, "ether", "second")
    assert list(unet.state_dict()) == list(state)  # the base's own, while attached
    assert {id(p) for p in unet.parameters()}.isdisjoint({id(p) for p in adapter.parameters()})
    adapter.detach()
    assert host_of(unet) is not None
    second.detach()
    second.detach()  # a second time does nothing
    assert traces(unet) == before
    assert torch.equal(run(unet), output)
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())


def test_initial_vectors_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    generator = torch.random.get_rng_state()
    first, again, other = (attach(tiny_meta(), EtherConfig("ether", seed=seed)).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    assert all(torch.allclose(u.norm(dim=-1), torch.ones(len(u))) for u in first.values())
    rows = torch.cat([u for u in first.values() if u.shape == (4, 16)])
    assert torch.unique(rows, dim=0).shape == rows.shape  # no two projections share a direction


def tiny_meta() -> nn.Module:
    with torch.device("meta"):
        return tiny_unet()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@KIND
def test_casting_the_model_leaves_vectors_in_fp32_and_the_output_close(
    unet: UNet2DConditionModel, kind: str, dtype: torch.dtype
) -> None:
    adapter = shaken(unet, kind)
    expected = run(unet)
    unet.to(dtype)
    output = run(unet, dtype)
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    assert output.dtype == dtype
    assert relative_error(output, expected) < MODEL[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_pipeline_leaves_vectors_in_fp32(pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    adapter = shaken(pipe.unet)
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    pipe.to(dtype)
    assert pipe.unet.dtype == dtype
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


@KIND
def test_autocast_output_and_gradients_are_close_to_fp32(unet: UNet2DConditionModel, kind: str) -> None:
    adapter = shaken(unet, kind)

    def gradients() -> tuple[Tensor, Tensor]:
        sample = unet(**unet_inputs()).sample.float()
        grads = torch.autograd.grad(sample.square().mean(), list(adapter.parameters()))
        assert all(grad.dtype == torch.float32 for grad in grads)
        return sample, torch.cat([grad.flatten() for grad in grads])

    expected, expected_gradient = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample, gradient = gradients()
    assert relative_error(sample, expected) < MODEL[torch.bfloat16]
    assert torch.cosine_similarity(gradient, expected_gradient, dim=0) > 0.99
    assert gradient.norm() / expected_gradient.norm() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("strengths", [{"a": 1.0}, {"a": 0.5}, {"a": 0.5, "b": 1.0}], ids=str)
@pytest.mark.parametrize("tokens", [5, 400], ids=["few tokens", "many tokens"])
@KIND
def test_autocast_to_fp16_trains_with_a_scaled_loss(kind: str, strengths: dict[str, float], tokens: int) -> None:
    """The scale is a gradient scaler's first: sums over tokens in fp16 would overflow."""
    model = attention(bias=True)
    for name in strengths:
        shaken(model, kind, name)
    host = host_of(model)
    assert host is not None
    host.set_active(strengths)
    parameters = [p for name in strengths for p in host.adapters[name].parameters()]
    x = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for autocast, scale in ((False, 1.0), (True, 2.0**16)):
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            output = model(x)
        assert output.dtype == (torch.float16 if autocast else torch.float32)
        gradients = torch.autograd.grad(scale * output.float().square().mean(), parameters)
        found.append((output.float(), torch.cat([each.flatten() / scale for each in gradients])))
    (expected, wanted), (half, got) = found
    assert relative_error(half, expected) < MODEL[torch.float16]
    assert (got - wanted).norm() < 0.01 * wanted.norm()


@KIND
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_gradient_checkpointing_gives_the_same_gradients(
    unet: UNet2DConditionModel, kind: str, strength: float
) -> None:
    adapter = shaken(unet, kind)
    assert adapter.host is not None
    adapter.host.set_active({"default": strength})

    def gradients() -> list[Tensor]:
        loss = unet(**unet_inputs()).sample.square().mean()
        return list(torch.autograd.grad(loss, list(adapter.parameters())))

    expected = gradients()
    assert any(grad.abs().max() > 0 for grad in expected)
    unet.train()
    unet.enable_gradient_checkpointing()
    assert all(torch.equal(got, want) for got, want in zip(gradients(), expected, strict=True))


def attention(bias: bool = False) -> Attention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attention(32, heads=2, dim_head=16, bias=bias).requires_grad_(False)


def compiled_copy(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager", fullgraph=True)  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager", fullgraph=True)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "autocast", "tokens"),
    [(torch.bfloat16, False, 5), (torch.bfloat16, False, 64), (torch.float16, False, 64), (torch.float32, True, 5)],
    ids=["bf16, on the activations", "bf16, low rank", "fp16, low rank", "autocast, on the activations"],
)
def test_half_precision_compiles_to_what_it_is_without(dtype: torch.dtype, autocast: bool, tokens: int) -> None:
    torch.compiler.reset()
    model = attention(bias=True).to(dtype)
    adapter = shaken(model)
    x = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(1)).to(dtype)

    def outcome(module: nn.Module) -> tuple[Tensor, Tensor]:
        adapter.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = module(x)
        output.float().square().mean().backward()
        return output.detach(), torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])

    (output, gradient), (compiled, compiled_gradient) = outcome(model), outcome(compiled_copy(model))
    assert output.dtype == compiled.dtype
    eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    assert relative_error(compiled, output) < 2 * eps
    assert relative_error(compiled_gradient, gradient) < 8 * eps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "tokens"),
    [(compiled_copy, 5), (compiled_in_place, 64)],
    ids=["a copy, on the activations", "in place, low rank"],
)
def test_compiled_modules_follow_every_change_of_the_adapter(
    compiled: Callable[[nn.Module], nn.Module], tokens: int
) -> None:
    torch.compiler.reset()
    model, twin = compiled(attention(bias=True)), attention(bias=True)
    x = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(1))
    base = model(x)
    adapters = [shaken(m) for m in (model, twin)]
    hosts = [host_of(m) for m in (model, twin)]

    def agree() -> float:
        torch.testing.assert_close(model(x), twin(x), rtol=1e-6, atol=1e-6)
        return (model(x) - base).abs().max().item()

    assert agree() > 0.05  # attached after compiling
    for adapter in adapters:
        shake(adapter, seed=2)
    assert agree() > 0.05  # vectors changed
    seen = []
    for strength in (0.5, 0.25, -1.0, *(i / 20 for i in range(1, 11))):  # more than dynamo's limit of recompilations
        for host in hosts:
            assert host is not None
            host.set_active({"default": strength})
        seen.append(agree())
    assert len(set(seen)) > 10
    for host in hosts:
        host.enable(False)  # type: ignore[union-attr]
    assert agree() == 0
    for host in hosts:
        host.enable()  # type: ignore[union-attr]
    assert agree() > 0.01
    for host in hosts:
        host.fuse()  # type: ignore[union-attr]
    assert agree() > 0.01
    for host in hosts:
        host.unfuse()  # type: ignore[union-attr]
    grads = [
        torch.autograd.grad(m(x).square().sum(), list(a.parameters()))
        for m, a in zip((model, twin), adapters, strict=True)
    ]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for adapter in adapters:
        adapter.detach()
    assert agree() == 0
    torch.compiler.reset()


def with_biases() -> UNet2DConditionModel:
    """A UNet whose attention projections all have biases that matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = tiny_unet().requires_grad_(False).eval()
    for target in find_targets(unet):
        target.module.bias = nn.Parameter(torch.linspace(-1, 1, target.out_features), requires_grad=False)
    return unet


def cpu_offload(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("order", ["attached first", "offloaded first"])
@pytest.mark.parametrize("strengths", [[1.0], [0.7], [1.0, 0.5]], ids=str)
@KIND
def test_sequential_offload_with_biases_changes_nothing(kind: str, strengths: list[float], order: str) -> None:
    plain, offloaded = with_biases(), with_biases()

    def adapt(model: nn.Module) -> None:
        for i, _ in enumerate(strengths):
            shaken(model, kind, str(i), seed=i)
        host = host_of(model)
        assert host is not None
        host.set_active({str(i): strength for i, strength in enumerate(strengths)})

    adapt(plain)
    if order == "attached first":
        adapt(offloaded)
        cpu_offload(offloaded)
    else:
        cpu_offload(offloaded)
        adapt(offloaded)
    assert all(target.module.weight.is_meta for target in find_targets(offloaded))
    torch.testing.assert_close(run(offloaded), run(plain), rtol=1e-5, atol=1e-5)
    host = host_of(offloaded)
    assert host is not None
    with pytest.raises(ValueError, match=r"cannot fuse into offloaded weights: call pipe.remove_all_hooks"):
        host.fuse()
    host.enable(False)
    assert torch.equal(run(offloaded), run(with_biases()))
    host.enable()
    for adapter in list(host.adapters.values()):
        adapter.detach()
    accelerate.hooks.remove_hook_from_module(offloaded, recurse=True)
    assert torch.equal(run(offloaded), run(with_biases()))


def test_model_offload_hooks_stack_with_the_adapter(unet: UNet2DConditionModel) -> None:
    adapter = shaken(unet)
    expected = run(unet)
    _, hook = accelerate.cpu_offload_with_hook(unet, execution_device=torch.device("cpu"))
    assert torch.equal(run(unet), expected)
    hook.offload()
    adapter.detach()
    hook.remove()
    assert torch.equal(run(unet), run(build_unet()))


def test_a_deep_copy_has_an_adapter_of_its_own(unet: UNet2DConditionModel) -> None:
    adapter = shaken(unet)
    expected = run(unet)
    twin = copy.deepcopy(unet)
    host = host_of(twin)
    assert host is not None
    assert host.model is twin
    assert torch.equal(run(twin), expected)
    shake(host.adapters["default"], seed=5)
    changed = run(twin)
    assert not torch.equal(changed, expected)
    assert torch.equal(run(unet), expected)
    adapter.detach()
    assert torch.equal(run(unet), run(build_unet()))
    assert torch.equal(run(twin), changed)
    host.adapters["default"].detach()
    assert torch.equal(run(twin), run(build_unet()))


def broken(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One fault of every sort."""
    keys = list(state)
    state = {key: value.clone() for key, value in state.items()}
    state["mid_block.attentions.7.to_q.u"] = state[keys[0]]
    del state[keys[0]]
    state[keys[1]] = torch.ones(2, 3)
    state[keys[2]][0, 0] = float("nan")
    state[keys[3]][1] = 0
    state[keys[4]] = torch.ones_like(state[keys[4]], dtype=torch.int64)
    state[keys[5]][0] = 1e-20  # below the floor of the norm: no direction either
    return state


def test_loading_a_wrong_state_lists_every_fault_and_changes_nothing(unet: UNet2DConditionModel) -> None:
    adapter = shaken(unet)
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    keys = list(before)
    with pytest.raises(ValueError, match="does not fit adapter 'default'") as error:
        adapter.load_state_dict(broken(before))
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(lines) == sorted(
        [
            "unknown key: mid_block.attentions.7.to_q.u",
            f"missing key: {keys[0]}",
            f"wrong shape: {keys[1]} is (2, 3), the model needs (4, 16)",
            f"not finite: {keys[2]} holds NaN or infinity",
            f"zero vector: {keys[3]} has a row of length zero, which no reflection can have",
            f"wrong dtype: {keys[4]} is torch.int64, no floating dtype",
            f"zero vector: {keys[5]} has a row of length zero, which no reflection can have",
        ]
    )
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_half_precision_state_keeps_fp32_parameters(unet: UNet2DConditionModel, assign: bool) -> None:
    adapter = shaken(unet)
    state = {key: value.half() for key, value in adapter.state_dict().items()}
    adapter.load_state_dict(state, assign=assign)
    assert all(torch.equal(value, state[key].float()) for key, value in adapter.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())


def test_state_dict_has_the_models_own_paths(unet: UNet2DConditionModel) -> None:
    adapter = attach(unet)
    modules = dict(unet.named_modules())
    for key, value in adapter.state_dict().items():
        path, _, vector = key.rpartition(".")
        linear = modules[path]
        width = linear.out_features if vector.endswith("_out") else linear.in_features
        assert value.shape == (4, width // 4)
        assert value.dtype == torch.float32
    assert {key.rpartition(".")[2] for key in adapter.state_dict()} == {"u", "v", "u_out", "v_out"}


def add_lora(unet: UNet2DConditionModel) -> None:
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "lora")
    shake_lora(unet)


def shake_lora(unet: UNet2DConditionModel) -> None:
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for key, parameter in sorted(unet.named_parameters()):
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("order", ["lora first", "ether first"])
@KIND
def test_lora_on_the_same_projections_adds_its_own_delta(kind: str, order: str) -> None:
    unet = build_unet()
    if order == "lora first":
        add_lora(unet)
        adapter = shaken(unet, kind)
    else:
        adapter = shaken(unet, kind)
        add_lora(unet)
    assert set(adapter.state_dict()) == set(attach(tiny_unet(), KINDS[kind]).state_dict())  # same canonical keys
    dense = build_unet()
    loras = {path: module for path, module in unet.named_modules() if hasattr(module, "base_layer")}
    with torch.no_grad():
        for path, module in dense.named_modules():
            if path in loras:
                layer = loras[path]
                delta = layer.lora_B["lora"].weight.double() @ layer.lora_A["lora"].weight.double()
                base = module.weight.double()
                module.weight.copy_(dense_weight(base, vectors_of(adapter, path)) + delta)
    assert relative_error(run(unet), run(dense)) < MODEL[torch.float32]
    adapter.detach()
    with_lora = run(unet)
    assert relative_error(with_lora, run(build_unet())) > 1e-3
    assert relative_error(with_lora, run(dense)) > 1e-3


class Int8Linear(nn.Module):
    """A weight-only quantised projection, as the libraries make them: int8 numbers, one scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantised(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)


class OpaqueLinear(nn.Module):
    """A projection that shows no weight tensor and hides its bias behind a method, as torch.ao's does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._inner = [linear]

    def bias(self) -> Tensor | None:
        return self._inner[0].bias

    def forward(self, x: Tensor) -> Tensor:
        return self._inner[0](x)


@pytest.mark.parametrize("stand_in", [Int8Linear, OpaqueLinear])
@pytest.mark.parametrize("strength", [1.0, 0.5])
@KIND
def test_a_quantised_base_works_unfused_and_refuses_to_fuse(
    kind: str, strength: float, stand_in: type[nn.Module]
) -> None:
    model = nn.ModuleDict({"proj": stand_in(source := nn.Linear(16, 24).requires_grad_(False))})
    adapter = attach(model, EtherConfig(**{**KINDS[kind].to_dict(), "targets": ("proj",)}))
    shake(adapter)
    host = host_of(model)
    assert host is not None
    host.set_active({"default": strength})
    quantised = model["proj"]
    weight = quantised.dequantised() if isinstance(quantised, Int8Linear) else source.weight
    dense = dense_weight(weight, vectors_of(adapter, "proj"))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    total = weight.double() + strength * (dense - weight.double())
    output = quantised(x)
    assert relative_error(output, x.double() @ total.T + source.bias.double()) < DIRECT[torch.float32]
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    with pytest.raises(ValueError, match=f"cannot fuse into {stand_in.__name__}: its weight is quantised"):
        host.fuse()
    assert not host.fused
    assert torch.equal(quantised(x), output)


@pytest.mark.filterwarnings("ignore:.*quanti:DeprecationWarning", "ignore:.*quanti:UserWarning")
def test_torch_dynamic_int8_base_works_unfused(unet: UNet2DConditionModel) -> None:
    quantisation = pytest.importorskip("torch.ao.quantization")
    quantised = quantisation.quantize_dynamic(unet, {nn.Linear}, dtype=torch.qint8)
    base = run(quantised)
    adapter = attach(quantised)
    assert torch.equal(run(quantised), base)  # ETHER+ starts as the identity, biases of to_out included
    shake(adapter)
    assert relative_error(run(quantised), base) > 1e-2
    with pytest.raises(ValueError, match="its weight is quantised"):
        host_of(quantised).fuse()  # type: ignore[union-attr]


def test_fusing_stops_before_any_weight_changes_if_one_is_quantised(unet: UNet2DConditionModel) -> None:
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.to_v = Int8Linear(attn.to_v)
    adapter = shaken(unet)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    output = run(unet)
    with pytest.raises(ValueError, match="quantised"):
        adapter.host.fuse()  # type: ignore[union-attr]
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    assert torch.equal(run(unet), output)


def test_fused_then_cast_then_unfused_is_the_cast_base(unet: UNet2DConditionModel) -> None:
    adapter = shaken(unet)
    host = adapter.host
    assert host is not None
    host.fuse()
    unet.to(torch.bfloat16)
    host.unfuse()
    expected = build_unet().to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize(
    ("wish", "change"),
    [
        ("attach another adapter", lambda host: attach(host.model, name="new")),
        ("remove 'default'", lambda host: host.adapters["default"].detach()),
        ("change which adapters are active", lambda host: host.set_active({})),
        ("turn adapters on or off", lambda host: host.enable(False)),
        ("fuse again", lambda host: host.fuse()),
    ],
)
def test_fused_adapters_refuse_changes(unet: UNet2DConditionModel, wish: str, change: Callable[[Any], Any]) -> None:
    host = shaken(unet).host
    assert host is not None
    host.fuse()
    output = run(unet)
    with pytest.raises(RuntimeError, match=f"cannot {wish} while adapters are fused into the weights: call unfuse"):
        change(host)
    assert torch.equal(run(unet), output)
    assert list(host.adapters) == ["default"]


@pytest.mark.parametrize(
    ("name", "message"), [("default", "an adapter 'default' is attached already"), ("", "an adapter needs a name")]
)
def test_names_that_cannot_be_attached(unet: UNet2DConditionModel, name: str, message: str) -> None:
    attach(unet)
    with pytest.raises(ValueError, match=message):
        attach(unet, name=name)


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ({"cat": 1.0}, "no adapter 'cat' here; there are: default"),
        ({"default": float("nan")}, "the strength of 'default' must be a finite number, not nan"),
        ({"default": float("inf")}, "must be a finite number"),
    ],
)
def test_wrong_strengths_change_nothing(unet: UNet2DConditionModel, strengths: dict[str, float], message: str) -> None:
    host = shaken(unet).host
    assert host is not None
    with pytest.raises(ValueError, match=message):
        host.set_active(strengths)
    assert host.strengths == {"default": 1.0}


def test_adapters_with_different_targets_live_side_by_side(unet: UNet2DConditionModel) -> None:
    own = attach(unet, EtherConfig("ether", targets="self_attention"), "own")
    text = attach(unet, EtherConfig("ether_plus", targets=("attn2.to_k", "ff.net.2")), "text")
    shake(text)
    dense = build_unet()
    replace_weights(dense, {own: 1.0, text: 1.0})
    assert relative_error(run(unet), run(dense)) < MODEL[torch.float32]
    own.detach()
    dense = build_unet()
    replace_weights(dense, {text: 1.0})
    assert relative_error(run(unet), run(dense)) < MODEL[torch.float32]
