"""The folders that are shipped: a diffusers pipeline with the judges beside it, and what the second base adds; fp16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel

from ether_diffusion.playground.build.clip import text_tower
from ether_diffusion.playground.build.flow import flow_scheduler
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.unet import noise_scheduler
from ether_diffusion.playground.build.vocabulary import world_tokenizer

LIMIT = 20_000_000
"""Bytes of all weights of a base together."""
JUDGES = ("clip", "dino", "segmenter")


def assemble(project: Project, folder: Path) -> int:
    """Write pipeline and judges to ``folder`` from the finished stages.

    Returns:
        The bytes of all weights.

    Raises:
        ValueError: they are more than ``LIMIT``.
    """
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(project.model("autoencoder")).half(),
        text_encoder=text_tower(CLIPModel.from_pretrained(project.model("clip"), dtype=torch.float16)),
        tokenizer=world_tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(project.model("unet")).half(),
        scheduler=noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    for config in folder.glob("*/config.json"):
        forget_origin(config)
    for judge in JUDGES:
        shutil.copytree(project.model(judge), folder / "judges" / judge)
    return check_size(folder)


def assemble_own(project: Project, folder: Path) -> int:
    """Write what a flow transformer's base has of its own, transformer and scheduler, to ``folder``.

    Returns:
        The bytes of its weights.

    Raises:
        ValueError: they are more than ``LIMIT``.
    """
    shutil.copytree(project.model("flow"), folder / "transformer")
    forget_origin(folder / "transformer" / "config.json")
    flow_scheduler().save_pretrained(folder / "scheduler")
    return check_size(folder)


def forget_origin(config: Path) -> None:
    """Take out of a model's configuration the folder of this machine that it was loaded from."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def check_size(folder: Path, limit: int = LIMIT) -> int:
    """The bytes of all safetensors files below ``folder``.

    Raises:
        ValueError: they are more than ``limit``.
    """
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*.safetensors"))}
    total = sum(sizes.values())
    if total > limit:
        parts = ", ".join(f"{path} {size / 1e6:.2f}" for path, size in sizes.items())
        raise ValueError(f"the weights take {total / 1e6:.2f} MB, at most {limit / 1e6:.2f} may be: {parts}")
    return total
