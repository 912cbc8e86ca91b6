"""The judges of subjects, loaded by their names."""

from __future__ import annotations

import torch

from ether_diffusion.metrics.backbones import Dino, load_clip
from ether_diffusion.metrics.names import CLIP, DINO, LPIPS_SIZE
from ether_diffusion.metrics.perceptual import Lpips
from ether_diffusion.metrics.scoring import Judges


def load_judges(
    dino: str = DINO,
    clip: str = CLIP,
    lpips: str | None = None,
    lpips_net: str = "alex",
    lpips_size: int = LPIPS_SIZE,
    device: torch.device | str = "cpu",
) -> Judges:
    """Load the judges.

    Args:
        dino: Hub id, folder or ``playground``.
        clip: likewise, or ``anytorch:`` and a model of clip-anytorch.
        lpips: file with the trunk's weights, or ``lpips`` for those of that package; None for no LPIPS.
        lpips_net: ``alex`` or ``vgg``.
        lpips_size: pixels of the squares that LPIPS compares.
        device: where to compute.

    Raises:
        ImportError: a package is missing.
        OSError: a model cannot be loaded.
        ValueError: the trunk's weights are of another net.
    """
    perceptual = None if lpips is None else Lpips(lpips, lpips_net, lpips_size, device)
    try:
        return Judges(Dino(dino, device), load_clip(clip, device), perceptual)
    except OSError as error:
        raise OSError(f"a judge cannot be loaded: {error}") from error
