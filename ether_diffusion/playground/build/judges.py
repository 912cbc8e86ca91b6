"""The judges at work: CLIP's zero-shot answers and DINO's features, from a build's folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, SegformerForSemanticSegmentation, ViTModel

from ether_diffusion.playground.build.clip import similarities
from ether_diffusion.playground.build.dino import cls_features
from ether_diffusion.playground.build.segmenter import region_logits
from ether_diffusion.playground.world import BACKGROUNDS, COLOURS, KINDS, background_phrase
from ether_diffusion.playground.world.captions import with_article

BATCH = 256


class Judges:
    """CLIP, DINO and segmenter of the folder ``judges`` of a build, in fp32; pictures are (N, 3, 64, 64) in [-1, 1]."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.clip = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32).to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
        self.dino = ViTModel.from_pretrained(folder / "dino", add_pooling_layer=False, dtype=torch.float32)
        self.dino = self.dino.to(device).eval()
        segmenter = SegformerForSemanticSegmentation.from_pretrained(folder / "segmenter", dtype=torch.float32)
        self.segmenter = segmenter.to(device).eval()

    @torch.no_grad()
    def cosines(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """CLIP's cosine of every picture and prompt, (N, prompts)."""
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt").input_ids.to(self.device)
        return torch.cat([similarities(self.clip, chunk.to(self.device), tokens) for chunk in pictures.split(BATCH)])

    def kinds(self, pictures: Tensor) -> list[str]:
        """The class whose "a photo of a ..." is nearest."""
        best = self.cosines(pictures, [f"a photo of {with_article(kind)}" for kind in KINDS]).argmax(1)
        return [KINDS[index] for index in best.tolist()]

    def colours(self, pictures: Tensor) -> list[str]:
        """The likeliest colour under the softmax over "a photo of a <colour> <class>", summed over the classes."""
        prompts = [f"a photo of {with_article(f'{colour} {kind}')}" for colour in COLOURS for kind in KINDS]
        logits = self.cosines(pictures, prompts) * self.clip.logit_scale.exp()
        best = logits.softmax(1).view(-1, len(COLOURS), len(KINDS)).sum(2).argmax(1)
        return [COLOURS[index] for index in best.tolist()]

    def backgrounds(self, pictures: Tensor) -> list[str]:
        """The background whose phrase ("a beach") is nearest."""
        best = self.cosines(pictures, [background_phrase(background) for background in BACKGROUNDS]).argmax(1)
        return [BACKGROUNDS[index] for index in best.tolist()]

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """DINO's CLS features, (N, width)."""
        return torch.cat([cls_features(self.dino, chunk.to(self.device)) for chunk in pictures.split(BATCH)])

    @torch.no_grad()
    def regions(self, pictures: Tensor) -> Tensor:
        """The segmenter's map, (N, 64, 64) int64 of region ids."""
        return torch.cat([region_logits(self.segmenter, p.to(self.device)).argmax(1) for p in pictures.split(BATCH)])
