"""An adapter beneath diffusers' caches and attention backends acts as its fused weights do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from families.tiny import FLOW, build
from torch import Tensor

import ether_diffusion as ether
from ether_diffusion.families.registry import family_of

CACHES: dict[str, Callable[[DiffusionPipeline], Any]] = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=1.0),
    "pyramid attention broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        current_timestep_callback=lambda: pipe.current_timestep,
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BCHW",
        is_guidance_distilled=True,
    ),
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, max_order=1),
}
CACHED = [
    *(("flux", cache) for cache in CACHES),
    *(("flux2", cache) for cache in CACHES if cache != "first block"),
    *(("qwen_image", cache) for cache in ("first block", "TaylorSeer")),
    ("chroma", "pyramid attention broadcast"),
]
"""Those which diffusers itself runs on these families; its caches know no other of ours."""


def shaken(family: str) -> DiffusionPipeline:
    """A tiny pipeline with an adapter that is far from the identity."""
    pipe = build(family)
    pipe.set_progress_bar_config(disable=True)
    adapter = ether.attach(pipe.transformer, ether.EtherConfig("ether_plus"))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random))
    return pipe


def draw(pipe: DiffusionPipeline) -> Tensor:
    """Latents of six steps."""
    family = family_of(pipe)
    drawn: Tensor = pipe(
        height=32,
        width=32,
        num_inference_steps=6,
        output_type="latent",
        generator=[torch.Generator().manual_seed(0)],
        **family.drawing(["a dog"], family.GUIDANCE),
    ).images
    return drawn


@pytest.mark.parametrize(("family", "cache"), CACHED)
def test_a_cache_sees_what_it_would_with_fused_weights(family: str, cache: str) -> None:
    pipe = shaken(family)

    def cached() -> Tensor:
        pipe.transformer.enable_cache(CACHES[cache](pipe))
        drawn = draw(pipe)
        pipe.transformer.disable_cache()
        return drawn

    exact, seen = draw(pipe), cached()
    ether.fuse(pipe)
    fused = cached()
    ether.unfuse(pipe)
    ether.disable(pipe)
    effect = (exact - draw(pipe)).abs().max()
    assert (seen - exact).abs().max() > 1e-3 * effect, "the cache did something"
    # TaylorSeer extrapolates, which magnifies rounding
    torch.testing.assert_close(seen, fused, rtol=0, atol=3e-3 * float(effect))
    ether.enable(pipe)
    torch.testing.assert_close(draw(pipe), exact, rtol=0, atol=0)


@pytest.fixture
def backends() -> Iterator[None]:
    """diffusers keeps the backend that was set last for the whole process."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("family", FLOW)
def test_every_attention_backend_sees_the_adapter(family: str) -> None:
    pipe = shaken(family)
    drawn = []
    for backend in ("native", "_native_math"):
        pipe.transformer.set_attention_backend(backend)
        drawn.append(draw(pipe))
    ether.fuse(pipe)
    fused = draw(pipe)
    ether.unfuse(pipe)
    ether.disable(pipe)
    effect = float((fused - draw(pipe)).abs().max())
    assert effect > 1e-2
    for each in drawn:
        torch.testing.assert_close(each, fused, rtol=0, atol=1e-3 * effect)
