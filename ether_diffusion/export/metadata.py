"""What a LoRA file says of itself: kohya's settings, the ModelSpec, and where it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

from ether_diffusion.export.factors import LoraLayer
from ether_diffusion.export.tokens import told_of_token
from ether_diffusion.families.protocol import Family
from ether_diffusion.pipelines.file import public_name
from ether_diffusion.pipelines.fingerprint import base_hash
from ether_diffusion.pipelines.loaded import hosts_of
from ether_diffusion.pipelines.new_tokens import new_tokens
from ether_diffusion.pipelines.schema import ORIGIN

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NOTE = (
    "An exact copy of the adapters' update on this base. On a relative of the base this file adds the same update; "
    "the adapter itself would reflect the relative's own weights."
)


def describe(
    pipe: DiffusionPipeline,
    family: Family,
    strengths: Mapping[str, float],
    layers: Mapping[str, LoraLayer],
    kind: str,
    base: str | None = None,
) -> dict[str, str]:
    """The header of a LoRA file; all values are strings.

    Args:
        pipe: with the adapters.
        family: of its base.
        strengths: of the adapters that the file is made from.
        layers: the updates.
        kind: the format.
        base: what the base is called; where it was loaded from, if it is not given. Of a path the last part is told.
    """
    ranks, side = {layer.rank for layer in layers.values()}, family.native_resolution
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    origin = {
        "adapters": {name: {"strength": strength, **_adapter(pipe, name)} for name, strength in strengths.items()},
        "base_model": public_name(base or str(pipe.config.get("_name_or_path") or "")),
        "base_hash": {
            part: base_hash(getattr(pipe, part)) for part in dict.fromkeys(each.component for each in layers.values())
        },
        "format": kind,
        "library_version": version("ether-diffusion"),
        "note": NOTE,
    }
    return {
        **family.lora_metadata,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_args": "{}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": " + ".join(strengths),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": datetime.now(tz=UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.description": NOTE,
        ORIGIN: json.dumps(origin),
    }


def _adapter(pipe: DiffusionPipeline, name: str) -> dict[str, object]:
    """The settings of an adapter, a hash of its vectors, and its token, if it has one."""
    digest, configs = hashlib.sha256(), {}
    for component, host in sorted(hosts_of(pipe).items()):
        if name in host.adapters:
            adapter = host.adapters[name]
            configs[component] = adapter.config.to_dict()
            for key, value in sorted(adapter.state_dict().items()):
                digest.update(f"{component}.{key}".encode())
                digest.update(value.detach().to("cpu").contiguous().numpy().tobytes())
    embeds = new_tokens(pipe).get(name)
    return {"config": configs, "sha256": digest.hexdigest()} | ({} if embeds is None else told_of_token(embeds))
