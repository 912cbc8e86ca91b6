"""Do images keep to a semantic map? mIoU, mAcc and aAcc from one confusion matrix over the whole dataset.

A mean of the images' own mIoUs is another figure: there a class counts more the fewer images it is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation

from ether_diffusion.metrics.backbones import Picture
from ether_diffusion.metrics.dense import DenseModel
from ether_diffusion.metrics.names import IGNORE_INDEX
from ether_diffusion.playground import judge_folder
from ether_diffusion.playground.build.metrics import confusion, mean_iou


@dataclass(frozen=True)
class MapIds:
    """How the ids of the maps stand for the classes of the segmenter.

    Attributes:
        classes: of the segmenter.
        offset: the map's id of the segmenter's class 0; ids below it are nobody's and left out. 1 for ADE20K, whose
            maps call "other" 0: what transformers calls ``do_reduce_labels``, mmseg ``reduce_zero_label``.
        ignore_index: an id of the map, as it is in the file, that is left out, too; None for none.
    """

    classes: int
    offset: int = 0
    ignore_index: int | None = IGNORE_INDEX

    def to_classes(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """The segmenter's class of every pixel, (H, W); -1 where the pixel is left out.

        Raises:
            ValueError: an id is neither a class nor left out.
        """
        classes = ids.astype(np.int64) - self.offset
        left_out = (classes < 0) if self.ignore_index is None else (classes < 0) | (ids == self.ignore_index)
        if (unknown := np.unique(ids[~left_out & (classes >= self.classes)])).size:
            raise ValueError(
                f"the map has the ids {', '.join(map(str, unknown[:8].tolist()))}, but the segmenter's {self.classes} "
                f"classes are the ids {self.offset} to {self.offset + self.classes - 1}; --ignore_index leaves one "
                "out, --label_offset shifts them"
            )
        classes[left_out] = -1
        return classes


def map_confusion(predicted: NDArray[np.integer], ids: NDArray[np.integer], labels: MapIds) -> Tensor:
    """Pixels by the map's class (row) and the predicted one (column), (classes, classes) int64; matrices add up.

    Args:
        predicted: the segmenter's classes, (H, W).
        ids: the map's ids, (H, W).
        labels: how they belong together.

    Raises:
        ValueError: the sizes differ, or an id is neither a class nor left out.
    """
    if predicted.shape != ids.shape:
        raise ValueError(f"a prediction of {predicted.shape} pixels cannot be compared with a map of {ids.shape}")
    classes = labels.to_classes(ids)
    counted = classes >= 0
    return confusion(torch.from_numpy(predicted[counted]).long(), torch.from_numpy(classes[counted]), labels.classes)


def segmentation_scores(matrix: Tensor) -> dict[str, float]:
    """The scores of a confusion matrix (C, C); those of nothing are NaN.

    Returns:
        ``miou``, the mean over classes of hits / (pixels of the map or the prediction), over the classes that occur in
        either; ``macc``, the mean of hits / (pixels of the map), over the classes that occur in the map; ``aacc``, the
        share of all pixels that are hit.
    """
    hits, real = matrix.diagonal().double(), matrix.sum(1).double()
    present = real > 0
    return {
        "miou": mean_iou(matrix),
        "macc": (hits[present] / real[present]).mean().item(),
        "aacc": (hits.sum() / real.sum()).item(),
    }


def class_table(matrix: Tensor, names: Sequence[str]) -> list[dict[str, str | int | float | None]]:
    """Every class that occurs in maps or predictions: its ``iou``, ``accuracy`` (None where no map has it), pixels."""
    table: list[dict[str, str | int | float | None]] = []
    for number, name in enumerate(names):
        hit, real, predicted = (int(n) for n in (matrix[number, number], matrix[number].sum(), matrix[:, number].sum()))
        if real or predicted:
            scores = {"iou": hit / (real + predicted - hit), "accuracy": hit / real if real else None}
            table.append({"id": number, "name": name, **scores, "pixels": real, "predicted": predicted})
    return table


class Segmenter(DenseModel):
    """Any semantic segmentation model of transformers: SegFormer, UperNet, BEiT …, Mask2Former, MaskFormer.

    Args:
        name: Hub id, folder or ``playground``.
        device: where to compute.

    Attributes:
        names: of its classes, by id.
        label_offset: what its maps call its class 0, as its image processor has it.

    Raises:
        OSError: there is no such model, or it cannot be fetched.
        ValueError: it is no segmentation model, or its file lacks weights.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        loaders = {
            AutoModelForSemanticSegmentation: ("ForSemanticSegmentation",),
            AutoModelForUniversalSegmentation: (
                "MaskFormerForInstanceSegmentation",
                "Mask2FormerForUniversalSegmentation",
            ),
        }
        super().__init__(name, judge_folder(name, "segmenter"), loaders, "semantic segmentation", device)
        labels = self.model.config.id2label
        self.names = [str(labels[number]) for number in sorted(labels)]
        self.label_offset = int(bool(getattr(self.processor, "do_reduce_labels", False)))

    def maps(self, images: Sequence[Picture], show: str | None = None) -> Iterator[NDArray[np.int64]]:
        """The class of every pixel of each image at its own size, (H, W).

        Logits are brought to that size (bilinear) before the greatest is taken; the masks of Mask2Former and MaskFormer
        go through their own processor's ``post_process_semantic_segmentation``.
        """
        for outputs, sizes in self.outputs(images, show):
            if "logits" in outputs:
                size = sizes[0]
                found = F.interpolate(outputs.logits.float(), size, mode="bilinear", align_corners=False).argmax(1)
            else:
                found = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            yield from (each.cpu().numpy() for each in found)
