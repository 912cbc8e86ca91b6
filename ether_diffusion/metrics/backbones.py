"""The models whose features are compared: DINO for images, CLIP for images and prompts.

Every one is a Hub id, a local folder, or ``playground``; it sees images through its own image processor, in fp32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizer

from ether_diffusion.playground import judge_folder

BATCH = 32


class Dino:
    """DINO's CLS token of the last layer, after its norm.

    Args:
        name: of a ``ViTModel``, such as ``facebook/dino-vits16``.
        device: where to compute.

    Attributes:
        identity: the name, and a hash of the weights.

    Raises:
        OSError: there is no such model, or it cannot be fetched.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        folder = judge_folder(name, "dino")
        self.name, self.device = name, torch.device(device)
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
        self.identity = f"{name} ({weights_hash(self.model)})"
        self.model.requires_grad_(False).eval().to(self.device)

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit features of the images, (N, d) fp32 on the CPU."""
        seen = [
            self.model(pixel_values=pixels).last_hidden_state[:, 0]
            for pixels in _pixels(self.processor, images, self.device)
        ]
        return F.normalize(torch.cat(seen).cpu(), dim=-1)


class Clip:
    """CLIP's projected image and text features.

    Args:
        name: of a ``CLIPModel``, such as ``openai/clip-vit-large-patch14``.
        device: where to compute.

    Attributes:
        identity: the name, and a hash of the weights.

    Raises:
        OSError: there is no such model, or it cannot be fetched.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        folder = judge_folder(name, "clip")
        self.name, self.device = name, torch.device(device)
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        self.identity = f"{name} ({weights_hash(self.model)})"
        self.model.requires_grad_(False).eval().to(self.device)

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit features of the images, (N, d) fp32 on the CPU."""
        seen = [
            self.model.get_image_features(pixel_values=pixels).pooler_output
            for pixels in _pixels(self.processor, images, self.device)
        ]
        return F.normalize(torch.cat(seen).cpu(), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit features of the prompts, cut at the model's greatest length, (N, d) fp32 on the CPU."""
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output.cpu(), dim=-1)


def weights_hash(model: nn.Module) -> str:
    """Twelve hexadecimal digits that stand for the names and values of a model's state."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _pixels(processor: Any, images: Sequence[Image.Image], device: torch.device) -> list[Tensor]:
    """The images as the model takes them, in batches.

    Raises:
        ValueError: there are none.
    """
    if not images:
        raise ValueError("there are no images to look at")
    rgb = [image.convert("RGB") for image in images]
    return [
        processor(images=rgb[start : start + BATCH], return_tensors="pt").pixel_values.to(device)
        for start in range(0, len(rgb), BATCH)
    ]
