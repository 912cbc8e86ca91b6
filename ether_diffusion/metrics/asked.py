"""The judges of subjects, as flags of a command line."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ether_diffusion.metrics.names import CLIP, DINO, LPIPS_SIZE
from ether_diffusion.ranges import Range

if TYPE_CHECKING:
    from ether_diffusion.metrics.scoring import Judges


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
    import torch

    from ether_diffusion.metrics.judges import load_judges

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_judges(given.dino, given.clip, given.lpips, given.lpips_net, given.lpips_size, device)
