"""Stage 3: a ``ViTModel`` that learns without labels what looks alike.

As in DINO (arXiv:2104.14294) two views of one thing shall have one feature. The views are here two drawings of one
look: another place, size and background, cropped and softened apart. Nothing names a class or a colour, and no
individual's coat is among the looks. DINO's self-distillation finds out slowly what the views share when they are few
and small; InfoNCE against the other looks of the batch, which takes its place, finds it in minutes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from ether_diffusion.playground.build.clip import UNIT
from ether_diffusion.playground.build.drawings import load_pool, to_unit
from ether_diffusion.playground.build.loop import Stage, copy_weights
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.views import crop, soften

TEMPERATURE = 0.1
LEAST_CROP = 0.8


class DinoStage(Stage):
    """NT-Xent (arXiv:2002.05709) on the CLS tokens themselves, since by their cosines the judge will judge."""

    name = "dino"
    network: ViTModel

    def __init__(self, project: Project) -> None:
        self.device, self.training = project.device, project.preset.training[self.name]
        with project.seeded(self.name):
            self.network = ViTModel(ViTConfig(**project.preset.architecture.dino), add_pooling_layer=False)
        self.network.to(self.device)
        pool = load_pool(project.drawings, "pairs", project.preset.pairs, ("pictures",), self.device)
        self.pairs = pool["pictures"]

    def loss(self, dice: torch.Generator) -> Tensor:
        """:func:`alike_loss` of the two drawings of every look."""
        pairs = self.pairs[self.rows(len(self.pairs), dice)]
        views = soften(crop(to_unit(pairs.transpose(0, 1).flatten(0, 1)), LEAST_CROP, dice), dice)
        features = cls_features(self.network, views).float()
        with torch.autocast(self.device.type, enabled=False):
            return alike_loss(features)

    def start_from(self, folder: Path) -> None:
        """Go on with the model."""
        copy_weights(ViTModel.from_pretrained(folder / "judges" / "dino", add_pooling_layer=False), self.network)

    def save(self, folder: Path) -> None:
        """Write the model (fp16) and its image processor."""
        self.network.half().save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 64, "width": 64}, **UNIT).save_pretrained(folder)


def cls_features(vit: ViTModel, pictures: Tensor) -> Tensor:
    """The CLS token of the last layer for pictures (N, 3, 64, 64) in [-1, 1], (N, width)."""
    return vit(pixel_values=pictures).last_hidden_state[:, 0]


def alike_loss(features: Tensor) -> Tensor:
    """``-log softmax_j(cos(f_i, f_j) / τ)`` at i's other view, j over all but i: mean over features (2N, d).

    Rows k and N + k are two views of one thing.
    """
    unit = F.normalize(features, dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    logits = (unit @ unit.T / TEMPERATURE).masked_fill(itself, -torch.inf)
    other = torch.arange(len(unit), device=unit.device).roll(len(unit) // 2)
    return F.cross_entropy(logits, other)
