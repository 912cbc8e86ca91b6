"""The memory of a training step at the real sizes: computed on the meta device, bf16, batch 1, ETHER+ on all attention.

It writes ``ether_diffusion/doctor/memory.json``, which tells ``ether doctor`` what can be trained; ``docs/tables.py``
makes the table in ``docs/families.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from parameters import BASES

from ether_diffusion import EtherConfig
from ether_diffusion.doctor.capacity import COMPUTED
from ether_diffusion.families.registry import FAMILIES
from ether_diffusion.files import write_text
from ether_diffusion.training.memory import base_bytes, plan

LATENTS: dict[str, tuple[str, int, int]] = {
    "SD1.5": ("sd", 4, 8),
    "SDXL": ("sdxl", 4, 8),
    "SD3.5-medium": ("sd3", 16, 8),
    "FLUX.1-dev": ("flux", 16, 8),
    "FLUX.2 klein 4B": ("flux2", 128, 16),
    "FLUX.2 klein 9B": ("flux2", 128, 16),
    "Qwen-Image": ("qwen_image", 16, 8),
    "Z-Image": ("z_image", 16, 8),
}
"""Family, channels of the latents, and pixels per latent and side."""


def compute(names: Iterable[str] = BASES) -> dict[str, Any]:
    """By base: bytes of its weights, of what is trained, and of the activations at both resolutions."""
    found: dict[str, Any] = {}
    for name in names:
        family_name, *latents = LATENTS[name]
        with torch.device("meta"):
            denoiser = torch.nn.Module.to(BASES[name](), torch.bfloat16)
        kind = FAMILIES[family_name]
        pipe = SimpleNamespace(config={}, **{kind.DENOISER: denoiser})
        family = kind(cast(DiffusionPipeline, pipe))
        found[name] = {
            "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
            "base": {"bf16": base_bytes(denoiser), "nf4": base_bytes(denoiser, "nf4")},
            "activations": {},
        }
        for resolution in (512, 1024):
            for checkpointing in (False, True):
                each = plan(family, EtherConfig(), resolution, tuple(latents), checkpointing=checkpointing)  # type: ignore[arg-type]
                found[name]["activations"][f"{resolution}{' checkpointed' if checkpointing else ''}"] = each.activations
        found[name]["trained"] = each.trained + each.optimizer
    return found


if __name__ == "__main__":
    write_text(COMPUTED, json.dumps(compute(), indent=1) + "\n")
