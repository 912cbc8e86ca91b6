"""The adapter under every attention processor: the same as a UNet with dense W' under that processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPAGPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from helpers import relative_error, replace_weights, shake, unet_inputs
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import ether_diffusion as ether
from ether_diffusion import Adapter, EtherConfig
from ether_diffusion.core.host import host_of
from ether_diffusion.playground.tiny import tiny_pipeline, tiny_unet

IMAGE_TOKENS, IMAGE_WIDTH = 4, 16


def build_unet() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_unet().requires_grad_(False).eval()


def plain(processor: type) -> Callable[[UNet2DConditionModel], None]:
    return lambda unet: unet.set_attn_processor(processor())


def sliced(unet: UNet2DConditionModel) -> None:
    unet.set_attention_slice(1)
    assert all(isinstance(processor, SlicedAttnProcessor) for processor in unet.attn_processors.values())


def default(unet: UNet2DConditionModel) -> None:
    unet.set_attn_processor(AttnProcessor())
    unet.set_default_attn_processor()


def for_each(unet: UNet2DConditionModel, make: Callable[[bool, int], object]) -> None:
    """Give every attention the processor that ``make(is_cross, width)`` returns; its own weights come from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        modules = {path: module for path, module in unet.named_modules() if isinstance(module, Attention)}
        processors = {
            f"{path}.processor": make(module.is_cross_attention, module.to_q.out_features)
            for path, module in modules.items()
        }
    unet.set_attn_processor(processors)


def custom_diffusion(processor: type, own_queries: bool) -> Callable[[UNet2DConditionModel], None]:
    """Custom Diffusion's own k and v in the cross attentions; without them the processor calls the projections."""

    def make(is_cross: bool, width: int) -> object:
        return processor(
            train_kv=is_cross and not own_queries,
            train_q_out=is_cross and own_queries,
            hidden_size=width,
            cross_attention_dim=32 if is_cross else None,
        )

    return lambda unet: for_each(unet, make)


def pag(processor: type) -> Callable[[UNet2DConditionModel], None]:
    return lambda unet: for_each(unet, lambda is_cross, width: AttnProcessor2_0() if is_cross else processor())


PROCESSORS: dict[str, Callable[[UNet2DConditionModel], None]] = {
    "default": default,
    "eager": plain(AttnProcessor),
    "SDPA": plain(AttnProcessor2_0),
    "sliced": sliced,
    "PAG": pag(PAGIdentitySelfAttnProcessor2_0),
    "PAG with CFG": pag(PAGCFGIdentitySelfAttnProcessor2_0),
    "Custom Diffusion, own k and v": custom_diffusion(CustomDiffusionAttnProcessor, own_queries=False),
    "Custom Diffusion, own q and out": custom_diffusion(CustomDiffusionAttnProcessor, own_queries=True),
    "Custom Diffusion SDPA, own k and v": custom_diffusion(CustomDiffusionAttnProcessor2_0, own_queries=False),
    "Custom Diffusion SDPA, own q and out": custom_diffusion(CustomDiffusionAttnProcessor2_0, own_queries=True),
}


def attached(unet: UNet2DConditionModel) -> Adapter:
    adapter = ether.attach(unet)
    shake(adapter)
    return adapter


@torch.no_grad()
def run(unet: UNet2DConditionModel, **extra: dict[str, list[Tensor]]) -> Tensor:
    return unet(**unet_inputs(batch=6), **extra).sample  # PAG takes the batch in two or three parts


@pytest.mark.parametrize("order", ["set before attach", "set after attach"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_adapter_acts_under_every_processor(name: str, order: str) -> None:
    unet = build_unet()
    if order == "set before attach":
        PROCESSORS[name](unet)
        adapter = attached(unet)
    else:
        adapter = attached(unet)
        PROCESSORS[name](unet)
    dense, base = build_unet(), build_unet()
    for other in (dense, base):
        PROCESSORS[name](other)
    replace_weights(dense, {adapter: 1.0})
    output = run(unet)
    assert relative_error(output, run(dense)) < 1e-5
    assert relative_error(output, run(base)) > 1e-2
    adapter.detach()
    assert torch.equal(run(unet), run(base))


def test_fused_qkv_is_refused_until_the_adapter_is_fused_or_qkv_unfused() -> None:
    unet = build_unet()
    adapter = attached(unet)
    expected, host = run(unet), host_of(unet)
    assert host is not None
    unet.fuse_qkv_projections()
    assert all(isinstance(processor, FusedAttnProcessor2_0) for processor in unet.attn_processors.values())
    with pytest.raises(RuntimeError, match=r"bypasses .* unfuse_qkv_projections\(\), or ether.fuse\(pipe\) before"):
        run(unet)
    with pytest.raises(ValueError, match=r"q, k, v projections are fused: call unfuse_qkv_projections\(\) before"):
        host.fuse()  # the fused projection already holds the base's weights: fusing now would change nothing
    with pytest.raises(ValueError, match=r"q, k, v projections are fused: call unfuse_qkv_projections\(\) before"):
        ether.attach(unet, name="second")
    host.enable(False)
    assert relative_error(run(unet), run(build_unet())) < 1e-5
    host.enable()
    unet.unfuse_qkv_projections()
    assert torch.equal(run(unet), expected)
    host.fuse()
    unet.fuse_qkv_projections()
    assert relative_error(run(unet), expected) < 1e-5
    with pytest.raises(RuntimeError, match=r"call unfuse_qkv_projections\(\) first"):
        host.unfuse()
    unet.unfuse_qkv_projections()
    host.unfuse()
    assert torch.equal(run(unet), expected)
    adapter.detach()
    assert torch.equal(run(unet), run(build_unet()))


def ip_adapter_weights(unet: UNet2DConditionModel) -> dict[str, dict[str, Tensor]]:
    """A small IP-Adapter in the layout of its published files: odd numbers are the cross attentions."""
    generator = torch.Generator().manual_seed(4)

    def randn(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    image_proj = {
        "proj.weight": randn(IMAGE_TOKENS * 32, IMAGE_WIDTH),
        "proj.bias": randn(IMAGE_TOKENS * 32),
        "norm.weight": 1 + randn(32),
        "norm.bias": randn(32),
    }
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    cross = {2 * i + 1 for i in range(len(attentions) // 2)}
    kv = {f"{i}.to_{name}_ip.weight": randn(64, 32) for i in sorted(cross) for name in "kv"}
    return {"image_proj": image_proj, "ip_adapter": kv}


@pytest.mark.parametrize("processor", [IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0])
@pytest.mark.parametrize("order", ["set before attach", "set after attach"])
def test_adapter_acts_under_ip_adapter_processors(processor: type[nn.Module], order: str) -> None:
    def with_ip_adapter(unet: UNet2DConditionModel) -> None:
        unet._load_ip_adapter_weights([ip_adapter_weights(unet)])

        def make(is_cross: bool, width: int) -> object:
            if not is_cross:
                return AttnProcessor()
            made = processor(hidden_size=width, cross_attention_dim=32, num_tokens=(IMAGE_TOKENS,))
            return made.requires_grad_(False)

        for_each(unet, make)

    image = {"added_cond_kwargs": {"image_embeds": [torch.linspace(-1, 1, IMAGE_WIDTH).repeat(6, 1, 1)]}}
    unet, dense, base = build_unet(), build_unet(), build_unet()
    if order == "set before attach":
        with_ip_adapter(unet)
        adapter = attached(unet)
    else:
        adapter = attached(unet)
        with_ip_adapter(unet)
    with_ip_adapter(dense)
    with_ip_adapter(base)
    replace_weights(dense, {adapter: 1.0})
    assert relative_error(run(unet, **image), run(dense, **image)) < 1e-5
    assert relative_error(run(unet, **image), run(base, **image)) > 1e-2


def test_patterns_do_not_reach_into_processors() -> None:
    """So a file made without an IP-Adapter fits a UNet that has one, and the other way round."""
    unet = build_unet()
    config = EtherConfig("ether", targets=("attn2.*",))
    before = set(ether.attach(unet, config, "before").state_dict())
    unet._load_ip_adapter_weights([ip_adapter_weights(unet)])
    assert set(ether.attach(unet, config, "after").state_dict()) == before


def picture(pipe: DiffusionPipeline, **extra: object) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a dog", num_inference_steps=2, generator=generator, output_type="pt", **extra).images


@pytest.mark.parametrize("order", ["IP-Adapter before", "IP-Adapter after"])
def test_loading_an_ip_adapter_into_the_pipeline_keeps_the_adapter(
    pipe: DiffusionPipeline, tmp_path: Path, order: str
) -> None:
    weights = ip_adapter_weights(pipe.unet)
    (tmp_path / "models").mkdir()
    save_file(
        {f"{part}.{key}": value for part, state in weights.items() for key, value in state.items()},
        tmp_path / "models" / "ip.safetensors",
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
        projection_dim=IMAGE_WIDTH,
    )
    CLIPVisionModelWithProjection(vision).save_pretrained(tmp_path / "models" / "image_encoder")
    base, dense = tiny_pipeline(), tiny_pipeline()
    pipelines = [pipe, base, dense]

    def load_ip_adapters() -> None:
        for each in pipelines:
            size = {"height": 32, "width": 32}
            each.register_modules(feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size))
            each.load_ip_adapter(str(tmp_path), subfolder="models", weight_name="ip.safetensors")

    if order == "IP-Adapter before":
        load_ip_adapters()
        adapter = attached(pipe.unet)
    else:
        adapter = attached(pipe.unet)
        load_ip_adapters()
    replace_weights(dense.unet, {adapter: 1.0})
    image = {"ip_adapter_image": Image.new("RGB", (32, 32), "orange")}
    other_image = {"ip_adapter_image": Image.new("RGB", (32, 32), "navy")}
    assert relative_error(picture(pipe, **image), picture(dense, **image)) < 1e-3
    assert relative_error(picture(pipe, **image), picture(base, **image)) > 0.01
    assert relative_error(picture(pipe, **image), picture(pipe, **other_image)) > 1e-4  # the image prompt acts too
    pipe.unload_ip_adapter()
    plain_dense = tiny_pipeline()
    replace_weights(plain_dense.unet, {adapter: 1.0})
    assert relative_error(picture(pipe), picture(plain_dense)) < 1e-3


def test_the_pag_pipeline_keeps_the_adapter() -> None:
    def build() -> DiffusionPipeline:
        return StableDiffusionPAGPipeline(
            **tiny_pipeline().components, requires_safety_checker=False, pag_applied_layers="mid"
        )

    pipe, dense, base = build(), build(), build()
    replace_weights(dense.unet, {attached(pipe.unet): 1.0})
    settings = {"pag_scale": 3.0}
    assert relative_error(picture(pipe, **settings), picture(dense, **settings)) < 1e-3
    assert relative_error(picture(pipe, **settings), picture(base, **settings)) > 0.01
    assert relative_error(picture(pipe, **settings), picture(pipe, pag_scale=0.0)) > 1e-4
