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


def formats(diffusers: Mapping[str, str], comfyui: Mapping[str, str] | None = None, original: bool = False) -> Formats:
    """The formats of a flow transformer.

    Args:
        diffusers: what the keys begin with there.
        comfyui: the same; None where ComfyUI knows no name for the layers.
        original: whether the layers' names in the code of the model's authors are known (``Family.ORIGINAL``).
    """
    found = {"diffusers": diffusers} if comfyui is None else {"diffusers": diffusers, "comfyui": comfyui}
    return found | ({"original": {"transformer": "diffusion_model."}} if original else {})


def modelspec(architecture: str, implementation: str, kohya: str | None = None) -> Mapping[str, str]:
    """Entries of the header.

    Args:
        architecture: of the ModelSpec.
        implementation: where its code is.
        kohya: what kohya's scripts call the base.
    """
    entries = {"modelspec.architecture": f"{architecture}/lora", "modelspec.implementation": implementation}
    return entries if kohya is None else {"ss_base_model_version": kohya, **entries}
