"""Stage 4: a small ``SegformerForSemanticSegmentation`` (arXiv:2105.15203) on the world's semantic maps."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

from ether_diffusion.playground.build.clip import UNIT
from ether_diffusion.playground.build.drawings import load_pool, to_unit
from ether_diffusion.playground.build.loop import Stage, copy_weights
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.views import soften
from ether_diffusion.playground.world import Region


class SegmenterStage(Stage):
    """Cross entropy per pixel of the full picture."""

    name = "segmenter"
    network: SegformerForSemanticSegmentation

    def __init__(self, project: Project) -> None:
        self.device, self.training = project.device, project.preset.training[self.name]
        labels = {int(region): region.name.lower() for region in Region}
        config = SegformerConfig(
            **project.preset.architecture.segmenter,
            id2label=labels,
            label2id={name: index for index, name in labels.items()},
        )
        with project.seeded(self.name):
            self.network = SegformerForSemanticSegmentation(config).to(self.device)
        names = ("pictures", "maps")
        pool = load_pool(project.drawings, "scenes", project.preset.scenes, names, self.device)
        self.pictures, self.maps = (pool[name] for name in names)

    def loss(self, dice: torch.Generator) -> Tensor:
        """The mean cross entropy of a batch's pixels."""
        rows = self.rows(len(self.pictures), dice)
        logits = region_logits(self.network, soften(to_unit(self.pictures[rows]), dice))
        return F.cross_entropy(logits.float(), self.maps[rows].long())

    def start_from(self, folder: Path) -> None:
        """Go on with the model."""
        copy_weights(SegformerForSemanticSegmentation.from_pretrained(folder / "judges" / "segmenter"), self.network)

    def save(self, folder: Path) -> None:
        """Write the model (fp16) and its image processor."""
        self.network.half().save_pretrained(folder)
        SegformerImageProcessorPil(size={"height": 64, "width": 64}, **UNIT).save_pretrained(folder)


def region_logits(segmenter: SegformerForSemanticSegmentation, pictures: Tensor) -> Tensor:
    """Logits for pictures (N, 3, H, W) in [-1, 1], at their size: (N, regions, H, W)."""
    logits = segmenter(pixel_values=pictures).logits
    return F.interpolate(logits, pictures.shape[-2:], mode="bilinear", align_corners=False)
