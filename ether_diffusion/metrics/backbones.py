"""The models whose features are compared: DINO for images, CLIP for images and prompts.

Every one is a Hub id, a local folder, or ``playground``; it sees images through its own image processor, in fp32.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizer

from ether_diffusion.images import load_image
from ether_diffusion.playground import judge_folder

BATCH = 32
ANYTORCH = "anytorch:"
"""Before the name of a CLIP that clip-anytorch is to load: ``anytorch:ViT-L/14``, or the path of its ``.pt`` file."""

Picture = Image.Image | Path
"""An image, or the path of one, which is opened when its turn comes: thousands need not be held in memory."""


class Backbone(ABC):
    """A model in fp32 that turns images into features.

    Args:
        name: what it is called.
        model: the model.
        preprocessing: how images become its input, in words.
        device: where to compute.

    Attributes:
        identity: what a score depends on: the ``model``, a hash of its ``weights``, its ``preprocessing``.
    """

    def __init__(self, name: str, model: nn.Module, preprocessing: str, device: torch.device | str) -> None:
        self.identity = {"model": name, "weights": weights_hash(model), "preprocessing": preprocessing}
        self.model: Any = model.requires_grad_(False).eval().to(torch.device(device))

    @property
    def device(self) -> torch.device:
        """Where the model is now; it may be moved between two uses."""
        place: torch.device = next(self.model.parameters()).device
        return place

    def image_features(self, images: Sequence[Picture], show: str | None = None) -> Tensor:
        """Unit features of the images, (N, d) fp32 on the CPU; every image passes the model once.

        Args:
            images: images, or their paths.
            show: name of a progress bar, None for none.

        Raises:
            ValueError: there are none.
            UnreadableImageError: a path is of no whole picture.
        """
        return F.normalize(self.raw_features(images, show), dim=-1)

    @torch.no_grad()
    def raw_features(self, images: Sequence[Picture], show: str | None = None) -> Tensor:
        """The features as the model gives them, of any length: what distributions are compared by."""
        return torch.cat([self._features(pixels) for pixels in self._batches(images, show)])

    def _batches(self, images: Sequence[Picture], show: str | None) -> Any:
        """The images as the model takes them, batch by batch; features of a batch go to the CPU."""
        if not images:
            raise ValueError("there are no images to look at")
        for start in tqdm(range(0, len(images), BATCH), desc=show, unit="batch", disable=show is None):
            yield self._pixels([as_rgb(image) for image in images[start : start + BATCH]]).to(self.device)

    @abstractmethod
    def _pixels(self, images: list[Image.Image]) -> Tensor:
        """RGB images as the model takes them, (N, 3, H, W) fp32."""

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """Features (N, d) on the CPU."""


class Processed(Backbone):
    """A model of transformers that sees images through its own image processor.

    Args:
        name: what it is called.
        folder: Hub id or folder that it is loaded from.
        model: the model, loaded from there.
        device: where to compute.
    """

    def __init__(self, name: str, folder: str, model: nn.Module, device: torch.device | str) -> None:
        self.processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
        super().__init__(name, model, describe_processor(self.processor), device)

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        pixels: Tensor = self.processor(images=images, return_tensors="pt").pixel_values
        return pixels


class Dino(Processed):
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
        features: Tensor = self.model(pixel_values=pixels).last_hidden_state[:, 0].cpu()
        return features


class Clip(Processed):
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
        features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output.cpu()
        return features

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit features of the prompts, cut at the model's greatest length, (N, d) fp32 on the CPU."""
        said = []
        for start in range(0, len(prompts), BATCH):
            part = list(prompts[start : start + BATCH])
            tokens = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(self.device)
            said.append(self.model.get_text_features(**tokens).pooler_output.cpu())
        return F.normalize(torch.cat(said), dim=-1)


class AnytorchClip(Backbone):
    """The same CLIP through ``clip-anytorch``, OpenAI's own code: a second opinion on the first.

    Args:
        name: of a model that ``clip.load`` knows, such as ``ViT-L/14``, or the path of its ``.pt`` file.
        device: where to compute.

    Raises:
        ImportError: the package or what it needs is not installed; the message says what to do.
        OSError: there is no such model, or it cannot be fetched.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        try:
            import clip
        except ImportError as error:
            raise ImportError(
                f"{ANYTORCH}{name} needs clip-anytorch, torchvision and setuptools below 81 ({error}): "
                "pip install 'ether-diffusion[clip]' 'setuptools<81'"
            ) from error
        try:
            model, self._preprocess = clip.load(name, torch.device(device), jit=False)
        except RuntimeError as error:  # an unknown name, or a file that is none of its models
            raise OSError(f"clip-anytorch cannot load {name!r}: {error}") from error
        self._tokenize = clip.tokenize
        side = model.visual.input_resolution
        preprocessing = f"clip-anytorch: shortest edge {side}, bicubic, centre crop {side}"
        super().__init__(f"{ANYTORCH}{name}", model.float(), preprocessing, device)

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        return torch.stack([self._preprocess(image) for image in images])

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels).cpu()
        return features

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit features of the prompts, cut at the model's greatest length, (N, d) fp32 on the CPU."""
        said = []
        for start in range(0, len(prompts), BATCH):
            tokens = self._tokenize(list(prompts[start : start + BATCH]), truncate=True).to(self.device)
            said.append(self.model.encode_text(tokens).cpu())
        return F.normalize(torch.cat(said), dim=-1)


def load_clip(name: str, device: torch.device | str = "cpu") -> Clip | AnytorchClip:
    """The CLIP of that name: ``anytorch:…`` through clip-anytorch, all others through transformers.

    Raises:
        ImportError: clip-anytorch is asked for and not installed.
        OSError: there is no such model, or it cannot be fetched.
    """
    if name.startswith(ANYTORCH):
        return AnytorchClip(name.removeprefix(ANYTORCH), device)
    return Clip(name, device)


def as_rgb(picture: Picture) -> Image.Image:
    """The picture in RGB, opened if it is a path."""
    return load_image(picture) if isinstance(picture, Path) else picture.convert("RGB")


def describe_processor(processor: Any) -> str:
    """How an image processor of transformers makes its input: class, sizes, filter, mean and deviation."""
    settings = processor.to_dict()
    names = ("size", "crop_size", "resample", "image_mean", "image_std")
    parts = [f"{name} {settings[name]}" for name in names if settings.get(name) is not None]
    return f"{type(processor).__name__}: {', '.join(parts)}"


def weights_hash(model: nn.Module) -> str:
    """Twelve hexadecimal digits that stand for the names and values of a model's state."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
