"""What a judge must not mind: another crop, and the softness of a decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE = 0.08


def soften(pictures: Tensor, dice: torch.Generator) -> Tensor:
    """Blur each of the pictures (N, C, H, W) by a random share, and add a little noise."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share, level = torch.rand(2, len(pictures), 1, 1, 1, generator=dice, device=pictures.device)
    noise = torch.randn(pictures.shape, generator=dice, device=pictures.device)
    return pictures.lerp(blurred, share) + NOISE * level * noise


def crop(pictures: Tensor, least: float, dice: torch.Generator) -> Tensor:
    """Cut a random square of ``least`` to all of each picture's side and resize it to the whole, (N, C, H, W)."""
    scale, x, y = torch.rand(3, len(pictures), generator=dice, device=pictures.device)
    scale = least + (1 - least) * scale
    shift = torch.stack([x, y], -1).mul(2).sub(1) * (1 - scale)[:, None]
    affine = torch.cat([torch.diag_embed(torch.stack([scale, scale], -1)), shift[:, :, None]], -1)
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
