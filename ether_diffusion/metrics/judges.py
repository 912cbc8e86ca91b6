"""The judges by name, as programs ask for them."""

from __future__ import annotations

import argparse

import torch

from ether_diffusion.metrics.backbones import Dino, load_clip
from ether_diffusion.metrics.perceptual import Lpips
from ether_diffusion.metrics.scoring import Judges
from ether_diffusion.ranges import Range

DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-large-patch14"
"""Who judges where nobody else is asked for: the models of the papers that print these scores."""
LPIPS_SIZE = 512


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


def add_judges(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the judges."""
    parser.add_argument("--dino", default=DINO, help="Hub id, folder or playground (default: %(default)s)")
    parser.add_argument("--clip", default=CLIP, help="likewise, or anytorch:ViT-L/14 (default: %(default)s)")
    parser.add_argument("--lpips", metavar="TRUNK", help="file of AlexNet's weights, or lpips; no LPIPS without it")
    parser.add_argument("--lpips_net", choices=("alex", "vgg"), default="alex")
    parser.add_argument(
        "--lpips_size", type=Range(16).of(int), default=LPIPS_SIZE, help="pixels (default: %(default)s)"
    )


def judges_of(given: argparse.Namespace) -> Judges:
    """The judges that the flags of :func:`add_judges` name, on the GPU if there is one.

    Raises:
        ImportError: a package is missing.
        OSError: a model cannot be loaded.
        ValueError: the trunk's weights are of another net.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_judges(given.dino, given.clip, given.lpips, given.lpips_net, given.lpips_size, device)
