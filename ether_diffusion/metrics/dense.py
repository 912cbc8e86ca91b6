"""Models of transformers that say something of every pixel: segmentation and depth, loaded whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor

from ether_diffusion.metrics.backbones import BATCH, Picture, as_rgb, describe_processor, weights_hash


class DenseModel:
    """A model in fp32 that sees images through its own image processor (Pillow's, never torchvision's).

    Args:
        name: what it is called.
        folder: Hub id or folder that it is loaded from.
        loaders: transformers' ``AutoModelFor…`` that may load it, and how the architectures of each end.
        task: what it is asked for, in words.
        device: where to compute.

    Attributes:
        identity: what a score depends on: the ``model``, a hash of its ``weights``, its ``preprocessing``.

    Raises:
        OSError: there is no such model, or it cannot be fetched.
        ValueError: it is a model for something else, or its file lacks weights, which would be random.
    """

    def __init__(
        self, name: str, folder: str, loaders: dict[Any, tuple[str, ...]], task: str, device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self.processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
        model = _load(name, folder, loaders, task)
        self.identity: dict[str, str] = {
            "model": name,
            "weights": weights_hash(model),
            "preprocessing": describe_processor(self.processor),
        }
        self.model: Any = model.requires_grad_(False).eval().to(self.device)

    @torch.no_grad()
    def outputs(
        self, images: Sequence[Picture], show: str | None = None
    ) -> Iterator[tuple[Any, list[tuple[int, int]]]]:
        """What the model says, batch by batch, with the (height, width) of each image of the batch.

        Only images of one size share a batch: none is padded because of another.
        """
        with tqdm(total=len(images), desc=show, unit="image", disable=show is None) as bar:
            for batch in _batches(images):
                inputs = self.processor(images=batch, return_tensors="pt")
                yield self.model(**inputs.to(self.device)), [(image.height, image.width) for image in batch]
                bar.update(len(batch))


def _batches(images: Sequence[Picture]) -> Iterator[list[Image.Image]]:
    for start in range(0, len(images), BATCH):
        opened = (as_rgb(image) for image in images[start : start + BATCH])
        for _, same in groupby(opened, key=lambda image: image.size):
            yield list(same)


def _load(name: str, folder: str, loaders: dict[Any, tuple[str, ...]], task: str) -> Any:
    architectures = AutoConfig.from_pretrained(folder).architectures or []
    for loader, endings in loaders.items():
        if any(architecture.endswith(endings) for architecture in architectures):
            model, report = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            if missing := sorted(report["missing_keys"]):
                raise ValueError(
                    f"{name} lacks {len(missing)} of its weights, {missing[0]} among them; take another file"
                )
            return model
    raise ValueError(
        f"{name} is a {', '.join(architectures) or 'model of unknown class'}, which is no model for {task}"
    )
