"""Stage 3: a ``ViTModel`` by self-distillation without labels, DINO (arXiv:2104.14294).

The two views of DINO are here two drawings of one look: another place, size and background, cropped and softened
apart. Nothing names a class or a colour, and no individual's coat is among the looks.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from ether_diffusion.playground.build.clip import UNIT
from ether_diffusion.playground.build.drawings import load_pool, to_unit
from ether_diffusion.playground.build.loop import Stage
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.views import crop, soften

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
CENTRE_DECAY = 0.9
TEACHER_DECAY = 0.99
"""Decay of the teacher's average at the start; it rises to 1 along a cosine."""
SPREAD_WEIGHT = 0.1
LEAST_CROP = 0.8


class Head(nn.Module):
    """DINO's projection: an MLP to the unit sphere and its cosines with prototypes."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 64))
        self.prototypes = nn.Parameter(torch.randn(prototypes, 64))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, width) to logits (N, prototypes)."""
        return F.normalize(self.mlp(features), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


class Distillation(nn.Module):
    """Student, teacher and the centre of the teacher's logits."""

    centre: Tensor

    def __init__(self, config: ViTConfig, prototypes: int) -> None:
        super().__init__()
        self.student = ViTModel(config, add_pooling_layer=False)
        self.student_head = Head(config.hidden_size, prototypes)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.student_head).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(prototypes))


class DinoStage(Stage):
    """Cross entropy from the teacher on one drawing to the student on the other, and KoLeo (arXiv:2304.07193)."""

    name = "dino"
    network: Distillation

    def __init__(self, project: Project) -> None:
        self.device, self.training = project.device, project.preset.training[self.name]
        architecture = project.preset.architecture
        with project.seeded(self.name):
            config = ViTConfig(**architecture.dino, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            self.network = Distillation(config, architecture.prototypes).to(self.device)
        pool = load_pool(project.drawings, "pairs", project.preset.pairs, ("pictures",), self.device)
        self.pairs = pool["pictures"]

    def loss(self, dice: torch.Generator) -> Tensor:
        """The distillation both ways; moves the centre."""
        pairs = self.pairs[self.rows(len(self.pairs), dice)]
        views = soften(crop(to_unit(pairs.transpose(0, 1).flatten(0, 1)), LEAST_CROP, dice), dice)
        network = self.network
        with torch.no_grad():
            kept = cls_features(network.teacher, views).float()
        features = cls_features(network.student, views).float()
        with torch.autocast(self.device.type, enabled=False):  # temperatures this low want the cosines in fp32
            with torch.no_grad():
                taught = network.teacher_head(kept)
            loss = distillation(taught, network.student_head(features), network.centre)
            loss = loss + SPREAD_WEIGHT * sum(spread(half) for half in features.chunk(2)) / 2
        network.centre.lerp_(taught.mean(0), 1 - CENTRE_DECAY)
        return loss

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the teacher towards the student."""
        share = (1 - TEACHER_DECAY) * (1 + math.cos(math.pi * progress)) / 2
        for teacher, student in (("teacher", "student"), ("teacher_head", "student_head")):
            kept, new = getattr(self.network, teacher), getattr(self.network, student)
            torch._foreach_lerp_(list(kept.parameters()), list(new.parameters()), share)

    def save(self, folder: Path) -> None:
        """Write the teacher (fp16) and its image processor."""
        self.network.teacher.half().save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 64, "width": 64}, **UNIT).save_pretrained(folder)


def cls_features(vit: ViTModel, pictures: Tensor) -> Tensor:
    """The CLS token of the last layer for pictures (N, 3, 64, 64) in [-1, 1], (N, width)."""
    return vit(pixel_values=pictures).last_hidden_state[:, 0]


def distillation(taught: Tensor, learnt: Tensor, centre: Tensor) -> Tensor:
    """``- Σ softmax((t - c) / τ_t) · log softmax(s / τ_s)`` across the halves of (2N, K) logits, both ways."""
    target = F.softmax((taught - centre) / TEACHER_TEMPERATURE, -1)
    other = target.roll(len(target) // 2, 0)
    return -(other * F.log_softmax(learnt / STUDENT_TEMPERATURE, -1)).sum(-1).mean()


def spread(features: Tensor) -> Tensor:
    """KoLeo: ``- mean log`` distance of each unit feature (N, d) to its nearest neighbour."""
    unit = F.normalize(features, dim=-1)
    with torch.no_grad():
        nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1)
    return -(F.pairwise_distance(unit, unit[nearest]) + 1e-6).log().mean()
