"""All families, and which of them a pipeline belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ether_diffusion.families.aura_flow import AuraFlow
from ether_diffusion.families.chroma import Chroma
from ether_diffusion.families.flux import Flux
from ether_diffusion.families.flux2 import Flux2
from ether_diffusion.families.hidream import HiDream
from ether_diffusion.families.ideogram4 import Ideogram4
from ether_diffusion.families.krea2 import Krea2
from ether_diffusion.families.lumina2 import Lumina2
from ether_diffusion.families.pixart_sigma import PixArtSigma
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.qwen_image import QwenImage
from ether_diffusion.families.sana import Sana
from ether_diffusion.families.sd import StableDiffusion
from ether_diffusion.families.sd3 import StableDiffusion3
from ether_diffusion.families.sdxl import StableDiffusionXL
from ether_diffusion.families.settings import FamilySettings
from ether_diffusion.families.z_image import ZImage

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FAMILIES: dict[str, type[Family]] = {
    family.NAME: family
    for family in (
        StableDiffusion,
        StableDiffusionXL,
        PixArtSigma,
        StableDiffusion3,
        Flux,
        Flux2,
        Chroma,
        AuraFlow,
        Sana,
        Lumina2,
        HiDream,
        QwenImage,
        ZImage,
        Krea2,
        Ideogram4,
    )
}
"""By name. A new family is a file beside this one and a name in this list."""


class UnknownFamilyError(ValueError):
    """No family claims a pipeline."""


def family_named(pipeline: str) -> type[Family]:
    """The family that trains pipelines of that class of diffusers.

    Raises:
        UnknownFamilyError: none does; the message lists those that are trained.
    """
    for family in FAMILIES.values():
        if pipeline in family.PIPELINES:
            return family
    served = ", ".join(f"{family.TITLE} ({' or '.join(family.PIPELINES)})" for family in FAMILIES.values())
    raise UnknownFamilyError(f"it is a {pipeline}, which nothing here trains; what can be trained: {served}")


def family_of(pipe: DiffusionPipeline, settings: FamilySettings | None = None) -> Family:
    """The family around a pipeline.

    Args:
        pipe: the pipeline.
        settings: what a run chooses.

    Raises:
        UnknownFamilyError: none claims pipelines of its class.
    """
    names = [kind.__name__ for kind in type(pipe).__mro__]
    for family in FAMILIES.values():
        if any(name in (*family.PIPELINES, *family.DERIVED) for name in names):
            return family(pipe, settings)
    return family_named(names[0])(pipe, settings)


def unused_parts(pipeline: str) -> tuple[str, ...]:
    """Parts that nothing here uses of pipelines of that class of diffusers; none where no family knows it."""
    known = (family for family in FAMILIES.values() if pipeline in (*family.PIPELINES, *family.DERIVED))
    return tuple(next((family.UNUSED for family in known), ()))


def control_place(pipe: DiffusionPipeline) -> tuple[str, int]:
    """Path of the denoiser's layer that a control is added after, and how many pixels a side each of its features has.

    Raises:
        ValueError: its family has no such place.
    """
    try:
        family = family_of(pipe)
    except UnknownFamilyError:  # another pipeline over a UNet
        return "conv_in", int(pipe.vae_scale_factor)
    if family.CONTROL_PLACE is None:
        raise ValueError(f"{family.TITLE} has no first layer that a control could be added after")
    return family.CONTROL_PLACE, family.divisor
