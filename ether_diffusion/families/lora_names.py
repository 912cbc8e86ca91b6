"""What readers of LoRA files call a base: what the keys of its components begin with, and its entries in the header.

What ends in a dot is followed by the layer's path with dots, else by the path with underscores, as kohya has it.
"""

from __future__ import annotations

from collections.abc import Mapping

Formats = Mapping[str, Mapping[str, str]]
"""From a format to what the keys of each component begin with."""

TRANSFORMER: Mapping[str, str] = {"transformer": "transformer."}
CLIP: Mapping[str, str] = {"text_encoder": "text_encoder.text_model."}
TWO_CLIPS: Mapping[str, str] = {**CLIP, "text_encoder_2": "text_encoder_2.text_model."}
T5 = "text_encoders.t5xxl.transformer."
"""In ComfyUI's files."""


def formats(diffusers: Mapping[str, str], comfyui: Mapping[str, str] | None = None) -> Formats:
    """The formats of a flow transformer; without ``comfyui`` ComfyUI knows no name for its layers."""
    return {"diffusers": diffusers} if comfyui is None else {"diffusers": diffusers, "comfyui": comfyui}


def modelspec(architecture: str, implementation: str, kohya: str | None = None) -> Mapping[str, str]:
    """Entries of the header.

    Args:
        architecture: of the ModelSpec.
        implementation: where its code is.
        kohya: what kohya's scripts call the base.
    """
    entries = {"modelspec.architecture": f"{architecture}/lora", "modelspec.implementation": implementation}
    return entries if kohya is None else {"ss_base_model_version": kohya, **entries}
