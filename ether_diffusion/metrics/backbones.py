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


class Backbone:
    """A model in fp32 with its image processor.

    Args:
        name: what it is called.
        folder: Hub id or folder that it is loaded from.
        model: the model, loaded from there.
        device: where to compute.

    Attributes:
        identity: the name, and a hash of the weights.
    """

    def __init__(self, name: str, folder: str, model: nn.Module, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.identity = f"{name} ({weights_hash(model)})"
        self.model: Any = model.requires_grad_(False).eval().to(self.device)

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit features of the images, (N, d) fp32 on the CPU.

        Raises:
            ValueError: there are none.
        """
        if not images:
            raise ValueError("there are no images to look at")
        seen = []
        for start in range(0, len(images), BATCH):
            rgb = [image.convert("RGB") for image in images[start : start + BATCH]]
            seen.append(self._features(self.processor(images=rgb, return_tensors="pt").pixel_values.to(self.device)))
        return F.normalize(torch.cat(seen).cpu(), dim=-1)

    def _features(self, pixels: Tensor) -> Tensor:
        """Features (N, d) of processed images (N, 3, H, W)."""
        raise NotImplementedError


class Dino(Backbone):
    """DINO's CLS token of the last layer, after its norm.

    Args:
        name: of a ``ViTModel``, such as ``facebook/dino-vits16``.
        device: where to compute.

    Raises:
        OSError: there is no such model, or it cannot be fetched.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        folder = judge_folder(name, "dino")
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
        super().__init__(name, folder, model, device)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


class Clip(Backbone):
    """CLIP's projected image and text features.

    Args:
        name: of a ``CLIPModel``, such as ``openai/clip-vit-large-patch14``.
        device: where to compute.

    Raises:
        OSError: there is no such model, or it cannot be fetched.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        folder = judge_folder(name, "clip")
        super().__init__(name, folder, CLIPModel.from_pretrained(folder, dtype=torch.float32), device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

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
