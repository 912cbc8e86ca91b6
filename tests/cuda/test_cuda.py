"""What only a GPU shows: autograd's own threads, bf16 and TF32 matmuls, offloading that moves, compiled kernels."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from helpers import DIRECT, dense_weight, replace_weights, shake, unet_inputs, vectors_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ether_diffusion as ether
from ether_diffusion import EtherConfig, attach
from ether_diffusion.core.host import Host, host_of
from ether_diffusion.core.switches import SwitchedError
from ether_diffusion.playground.tiny import tiny_pipeline, tiny_unet

pytestmark = pytest.mark.gpu
CUDA = "cuda"
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])
KIND = pytest.mark.parametrize("kind", ["ether", "ether_plus", "one-sided", "naive"])
CONFIGS = {
    "ether": EtherConfig("ether"),
    "ether_plus": EtherConfig(),
    "one-sided": EtherConfig(two_sided=False),
    "naive": EtherConfig("naive"),
}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Full fp32 in products and convolutions, but where a test asks for TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.compiler.reset()


def build(*names: str) -> tuple[UNet2DConditionModel, Host]:
    torch.manual_seed(0)
    unet = tiny_unet().requires_grad_(False).to(CUDA).eval()
    for seed, name in enumerate(names):
        shake(attach(unet, name=name), seed=seed + 1)
    host = host_of(unet)
    assert host is not None
    return unet, host


def inputs(seed: int = 3, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    given = {key: value.to(CUDA) for key, value in unet_inputs(seed, batch=batch).items()}
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}


def run(unet: nn.Module, seed: int = 3, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return unet(**inputs(seed, batch, dtype)).sample


def gradients(module: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    return found


def close(found: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    """Near in norm, all vectors together."""
    found, expected = ([each.double().cpu().flatten() for each in many] for many in (found, expected))
    difference = (torch.cat(found) - torch.cat(expected)).norm()
    assert difference <= rtol * torch.cat(expected).norm(), difference / torch.cat(expected).norm()


@KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tf32", [False, True])
def test_a_projection_is_the_dense_one(kind: str, dtype: torch.dtype, tf32: bool) -> None:
    if tf32 and dtype != torch.float32:
        pytest.skip("TF32 is a way of fp32 products")
    torch.manual_seed(3)
    model = nn.ModuleDict({"proj": nn.Linear(320, 640).requires_grad_(False)}).to(CUDA, dtype)
    adapter = attach(model, EtherConfig(**{**CONFIGS[kind].to_dict(), "targets": ("proj",)}))
    shake(adapter)
    weight = dense_weight(model["proj"].weight.cpu(), {k: v.cpu() for k, v in vectors_of(adapter, "proj").items()})
    bias, x = model["proj"].bias.double().cpu(), torch.randn(4, 77, 320, device=CUDA, dtype=dtype, requires_grad=True)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    output = model["proj"](x)
    expected = x.detach().double().cpu() @ weight.T + bias
    bound = 2**-9 if tf32 else DIRECT[dtype]
    assert output.dtype == dtype
    assert (output.double().cpu() - expected).abs().max() <= bound * expected.abs().max()
    upstream = torch.randn_like(output)
    output.backward(upstream)
    found = [x.grad, *(p.grad for p in adapter.parameters())]
    y = x.detach().double().cpu().requires_grad_()
    vectors = {k: v.detach().double().cpu().requires_grad_() for k, v in vectors_of(adapter, "proj").items()}
    dense = dense_weight(model["proj"].weight.cpu(), vectors)
    (y @ dense.T + bias).backward(upstream.double().cpu())
    wanted = [y.grad, *(vectors[key.rpartition(".")[2]].grad for key, _ in adapter.named_parameters())]
    for got, want in zip(found, wanted, strict=True):
        close([got], [want], 3 * bound)


@KIND
def test_a_unet_is_the_dense_one_in_half_precision_and_fp32(kind: str) -> None:
    torch.manual_seed(0)
    unet = tiny_unet().requires_grad_(False).to(CUDA).eval()
    adapter = attach(unet, CONFIGS[kind])
    shake(adapter)
    twin = tiny_unet().requires_grad_(False).eval()
    twin.load_state_dict({key: value.cpu() for key, value in unet.state_dict().items()})
    base = twin(**unet_inputs()).sample
    replace_weights(twin.double(), {copy.deepcopy(adapter).cpu(): 1.0})
    given = {k: v.double() if v.is_floating_point() else v for k, v in unet_inputs().items()}
    expected = twin(**given).sample
    with torch.no_grad():
        exact, half = run(unet).cpu().double(), run(unet.bfloat16(), dtype=torch.bfloat16).cpu().double()
    moved = (expected - base).norm()
    assert (exact - expected).norm() <= 1e-4 * moved
    assert (half - expected).norm() <= 0.03 * expected.norm()


@REENTRANT
@pytest.mark.parametrize("elsewhere", [False, True], ids=["this thread", "another thread"])
def test_gradients_under_checkpointing_are_those_without(reentrant: bool, elsewhere: bool) -> None:
    """Autograd runs the backward of CUDA on threads of its own, and a user may start it from any."""
    unet, host = build("a")
    run(unet).square().mean().backward()
    expected = gradients(host.adapters["a"])
    unet.train()
    unet.enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, use_reentrant=reentrant))
    run(unet, 9)  # rows of another forward
    given = inputs()
    given["sample"].requires_grad_()
    loss = unet(**given).sample.square().mean()
    if elsewhere:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    close(gradients(host.adapters["a"]), expected, 1e-4)


@REENTRANT
def test_a_switch_before_the_backward_is_an_error(reentrant: bool) -> None:
    unet, host = build("a", "b")
    host.set_active({"a": 1.0})
    unet.train()
    unet.enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, use_reentrant=reentrant))
    given = inputs()
    given["sample"].requires_grad_()
    loss = unet(**given).sample.square().mean()
    host.set_active({"b": 1.0})
    with pytest.raises(SwitchedError):
        loss.backward()
    host.set_active({"a": 1.0})
    unet(**given).sample.square().mean().backward()


def test_threads_that_share_a_unet_get_the_same_as_one_after_the_other() -> None:
    for strengths in ({"a": 1.0}, {"a": 0.7, "b": 0.4}, {}):
        unet, host = build("a", "b")
        host.set_active(strengths)
        with torch.no_grad():
            expected = {(seed, batch): run(unet, seed, batch) for seed in range(3) for batch in (1, 2, 3)}

            def serve(number: int, unet: nn.Module = unet, expected: dict[Any, Tensor] = expected) -> int:
                wrong = 0
                with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                    for turn in range(25):
                        key = ((number + turn) % 3, 1 + (number * turn) % 3)
                        wrong += not torch.allclose(run(unet, *key), expected[key], atol=1e-5)
                return wrong

            torch.cuda.synchronize()
            with ThreadPoolExecutor(8) as pool:
                assert sum(pool.map(serve, range(8))) == 0


def drawn(pipe: DiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    picture: Tensor = pipe("a", num_inference_steps=2, output_type="pt", generator=generator).images
    return picture.float().cpu()


@pytest.fixture
def adapted() -> DiffusionPipeline:
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    shake(attach(pipe.unet, name="dog"), seed=1)
    shake(attach(pipe.text_encoder, name="dog"), seed=2)
    return pipe


OFFLOADS: dict[str, Callable[[DiffusionPipeline, Path], Any]] = {
    "whole components": lambda pipe, _: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe, _: pipe.enable_sequential_cpu_offload(),
    "groups": lambda pipe, _: pipe.unet.enable_group_offload(CUDA, offload_type="leaf_level"),
    "groups with a stream": lambda pipe, _: pipe.unet.enable_group_offload(
        CUDA, offload_type="leaf_level", use_stream=True
    ),
    "groups on disk": lambda pipe, folder: pipe.unet.enable_group_offload(
        CUDA, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_changes_no_picture(adapted: DiffusionPipeline, offload: str, tmp_path: Path) -> None:
    expected = drawn(adapted.to(CUDA))
    base = drawn_without(adapted)
    if offload.startswith("groups"):
        adapted.unet.to("cpu")
    else:
        adapted.to("cpu")
    OFFLOADS[offload](adapted, tmp_path)
    torch.testing.assert_close(drawn(adapted), expected, atol=2e-3, rtol=0)
    assert (expected - base).abs().max() > 0.02
    if offload in ("whole components", "sequential"):
        adapted.remove_all_hooks()
        adapted.to(CUDA)
        torch.testing.assert_close(drawn(adapted), expected, atol=2e-3, rtol=0)


def drawn_without(pipe: DiffusionPipeline) -> Tensor:
    with ether.disabled(pipe):
        return drawn(pipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unfusing_restores_every_bit_wherever_the_model_went(adapted: DiffusionPipeline, dtype: torch.dtype) -> None:
    adapted.to(CUDA, dtype)
    before = {key: value.clone() for key, value in adapted.unet.state_dict().items()}
    expected = drawn(adapted)
    ether.fuse(adapted)
    assert (drawn(adapted) - expected).abs().max() < (1e-3 if dtype == torch.float32 else 0.2)
    adapted.to("cpu")
    adapted.to(CUDA)
    ether.unfuse(adapted)
    assert all(torch.equal(value, before[key]) for key, value in adapted.unet.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast_follows_fp32(dtype: torch.dtype) -> None:
    unet, host = build("a")
    adapter = host.adapters["a"]
    run(unet).square().mean().backward()
    expected = gradients(adapter)
    scaler = torch.amp.GradScaler(CUDA, enabled=dtype == torch.float16)
    with torch.autocast(CUDA, dtype):
        loss = run(unet).float().square().mean()
    scaler.scale(loss).backward()
    scale = scaler.get_scale() if dtype == torch.float16 else 1.0
    close([each / scale for each in gradients(adapter)], expected, 0.05)


def transformer(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    if kind == "sd3":
        sizes: dict[str, Any] = {"sample_size": 16, "num_layers": 2, "num_attention_heads": 4, "qk_norm": "rms_norm"}
        widths = {"joint_attention_dim": 64, "caption_projection_dim": 256, "pooled_projection_dim": 64}
        model: nn.Module = SD3Transformer2DModel(**sizes, **widths, out_channels=16, pos_embed_max_size=16)
        given = {"hidden_states": torch.randn(2, 16, 16, 16), "encoder_hidden_states": torch.randn(2, 77, 64)}
        given |= {"pooled_projections": torch.randn(2, 64), "timestep": torch.tensor([500.0, 300.0])}
    else:
        model = FluxTransformer2DModel(
            **{"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64, "num_attention_heads": 4},
            **{"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (16, 24, 24)},
        )
        given = {"hidden_states": torch.randn(2, 64, 64), "encoder_hidden_states": torch.randn(2, 20, 32)}
        given |= {"pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.5, 0.3])}
        given |= {"img_ids": torch.rand(64, 3), "txt_ids": torch.zeros(20, 3)}
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.05)  # outputs that begin at zero would hide everything
    return model.requires_grad_(False).eval().to(CUDA), {name: value.to(CUDA) for name, value in given.items()}


@pytest.mark.parametrize("model_kind", ["sd3", "flux"])
def test_transformers_are_the_dense_ones_with_their_gradients(model_kind: str) -> None:
    model, given = transformer(model_kind)
    adapter = attach(model)
    shake(adapter)
    loss = model(**given).sample.square().mean()
    loss.backward()
    found = gradients(adapter)
    twin = copy.deepcopy(model)
    other = host_of(twin).adapters["default"]
    other.detach()
    other.double()
    twin.double()
    parameters = dict(other.named_parameters())

    def dense(values: dict[str, Tensor]) -> Tensor:
        replaced = {}
        for path in other.methods():
            weight = twin.get_submodule(path).weight
            vectors = {k.removeprefix(f"{path}."): v.cpu() for k, v in values.items() if k.startswith(f"{path}.")}
            replaced[f"{path}.weight"] = dense_weight(weight.cpu(), vectors).to(CUDA)
        call = {name: value.double() for name, value in given.items()}
        return torch.func.functional_call(twin, replaced, kwargs=call).sample

    expected = dense(parameters).square().mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    close(found, gradients(other), 1e-3)


@pytest.mark.parametrize("kind", ["ether", "ether_plus"])
def test_compiled_kernels_give_outputs_and_gradients_of_the_eager_model(kind: str) -> None:
    model, given = transformer("sd3")
    adapter = attach(model, CONFIGS[kind])
    shake(adapter)
    expected = model(**given).sample
    expected.square().mean().backward()
    wanted = gradients(adapter)
    model.compile()
    found = model(**given).sample
    found.square().mean().backward()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    close(gradients(adapter), wanted, 1e-3)
