"""The pipeline that the state machine works on, what it is called with, and what is kept of it."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from pipelines.states.model import BATCH, Attached, Vectors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import ether_diffusion as ether
from ether_diffusion import Adapter, EtherConfig
from ether_diffusion.playground.tiny import tiny_tokenizer

SEQUENCES = int(os.environ.get("ETHER_STATE_SEQUENCES", "0"))
"""Sequences of a run by hand; 0 is the suite's short run."""
SHORT, STEPS, LONG_STEPS = 80, 15, 20
CHUNK = 100
"""Sequences of one run of hypothesis; a failure names the run, which is repeated by its number alone."""
COMPONENTS = ("unet", "text_encoder")
NAMES = ("a", "b", "c")
STRENGTHS = (1.0, 0.7, 0.0, -0.5)
LORA_NAMES = ("ink", "oil")
TARGETS: dict[str, tuple[str | tuple[str, ...], ...]] = {
    "unet": (
        "attention",
        "self_attention",
        "cross_attention",
        "attention+geglu",
        "attention+geglu_input",
        ("attn1.to_q", "attn2.to_v"),
        ("ff.net.2",),
        ("attn?.to_out.0", "time_embedding.*"),
        ("*",),
    ),
    "text_encoder": ("attention", ("q_proj", "fc1"), ("*",)),
}
METHODS = (("ether", True), ("ether_plus", True), ("ether_plus", False), ("naive", True))
ATTENTION = re.compile(r"attn[12]\.to_")
BLOCK = {"unet": "mid_block.attentions.0.transformer_blocks.0", "text_encoder": "encoder"}
"""A part of each component that is called alone."""
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2**-5}
"""Largest error of an output over its largest value. The frozen model's own is 5e-7 in fp32, 8e-3 in bf16; adapters
have fp32 vectors, in fp64 too."""
GRADIENTS = {torch.float64: 1e-5, torch.float32: 1e-4}
"""The same for the gradients of an adapter; sums over tokens in bf16 have no bound that says anything."""
RUNS: Counter[str] = Counter()
"""How often each rule ran, and what was refused."""


def state_pipeline() -> DiffusionPipeline:
    """A Stable Diffusion pipeline whose UNet has two attention layers; all weights are bf16 numbers, kept in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(32,),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D",),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=("UpBlock2D",),
            cross_attention_dim=16,
            attention_head_dim=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=16,
                intermediate_size=32,
                num_attention_heads=2,
                num_hidden_layers=1,
                projection_dim=16,
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    for module in (unet, text_encoder):
        module.requires_grad_(False).eval().to(torch.bfloat16).float()
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@functools.cache
def template() -> DiffusionPipeline:
    return state_pipeline()


def inputs(component: str, batch: int = BATCH, seed: int = 0) -> dict[str, Tensor]:
    """A batch whose samples differ, of numbers that bf16 has."""
    generator = torch.Generator().manual_seed(seed)
    if component == "text_encoder":
        return {"input_ids": torch.randint(0, 40, (batch, 6), generator=generator)}
    return {
        "sample": torch.randn(batch, 4, 4, 4, generator=generator).bfloat16().float(),
        "timestep": torch.arange(10, 10 + batch),
        "encoder_hidden_states": torch.randn(batch, 3, 16, generator=generator).bfloat16().float(),
    }


def part_inputs(component: str, seed: int = 0) -> dict[str, Tensor]:
    """A batch for the part of a component."""
    generator = torch.Generator().manual_seed(seed)
    if component == "text_encoder":
        return {"inputs_embeds": torch.randn(BATCH, 6, 16, generator=generator).bfloat16().float()}
    return {
        "hidden_states": torch.randn(BATCH, 16, 32, generator=generator).bfloat16().float(),
        "encoder_hidden_states": torch.randn(BATCH, 3, 16, generator=generator).bfloat16().float(),
    }


def in_dtype(given: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}


def error_of(found: Tensor, expected: Tensor) -> float:
    """Largest error over the largest value."""
    assert found.isfinite().all()
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def of_bits(generator: torch.Generator, *shape: int, scale: float) -> Tensor:
    return (scale * torch.randn(*shape, generator=generator)).bfloat16().float()


@dataclass
class Snapshot:
    """All that a verb which is refused must leave as it is."""

    outputs: dict[str, Tensor | str]
    weights: dict[str, Tensor]
    vectors: dict[str, Tensor]
    infos: dict[str, ether.AdapterInfo]

    def check_equal(self, later: Snapshot) -> None:
        assert self.infos == later.infos
        for mine, theirs in (
            (self.outputs, later.outputs),
            (self.weights, later.weights),
            (self.vectors, later.vectors),
        ):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                other = theirs[key]
                if isinstance(value, Tensor) and isinstance(other, Tensor):
                    assert torch.equal(value, other), f"{key} is not what it was"
                else:
                    assert value == other


@dataclass
class Saved:
    """An adapter file and what is in it."""

    path: Path
    content: dict[str, Attached] = field(repr=False)
    of_base: bool


class Warnings(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@functools.cache
def first_files() -> tuple[Saved, ...]:
    """Two adapters that every sequence may load: one of both components, and one of the UNet alone."""
    pipe, folder = state_pipeline(), Path(tempfile.mkdtemp(prefix="ether-states-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    found = []
    for name, components, config in (
        ("both", COMPONENTS, EtherConfig(n_blocks=2)),
        ("one", COMPONENTS[:1], EtherConfig("ether", targets="attention+geglu")),
    ):
        content = {}
        for component in components:
            adapter = ether.attach(getattr(pipe, component), config, name)
            content[component] = Attached(config, shaken(adapter, seed=len(name)))
        ether.save(pipe, folder / name, name)
        found.append(Saved(folder / name, content, of_base=True))
    return tuple(found)


def shaken(adapter: Adapter, seed: int) -> Vectors:
    """Move the vectors off the identity, and return a copy of them."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.05 if adapter.config.method == "naive" else 0.15
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return copied(adapter)


def copied(adapter: Adapter) -> Vectors:
    """The adapter's vectors as plain data."""
    found: Vectors = {}
    for key, value in adapter.state_dict().items():
        path, _, vector = key.rpartition(".")
        found.setdefault(path, {})[vector] = value.clone()
    return found
