"""The figures, free of models: how well pictures, maps and neighbours agree."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(pictures: Tensor, originals: Tensor) -> float:
    """Mean over pictures (N, 3, H, W) in [-1, 1] of ``10 log10(range² / MSE)`` in dB, each picture's own MSE."""
    mse = (pictures.double() - originals.double()).square().mean((1, 2, 3))
    return (10 * (4 / mse).log10()).mean().item()


def confusion(predicted: Tensor, true: Tensor, classes: int) -> Tensor:
    """Pixels by true class (row) and predicted class (column), (classes, classes) int64."""
    return torch.bincount(true.flatten() * classes + predicted.flatten(), minlength=classes**2).view(classes, classes)


def mean_iou(matrix: Tensor) -> float:
    """Mean intersection over union of the classes that occur at all in one confusion matrix over the whole set."""
    hits = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return (hits[union > 0] / union[union > 0]).mean().item()


def nearest_accuracy(queries: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """Share of the queries (N, d) whose nearest of the gallery (M, d) by cosine has the same label."""
    nearest = (F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T).argmax(1)
    return (gallery_labels[nearest] == labels).double().mean().item()


def share(hits: list[bool]) -> float:
    """The share of true ones.

    Raises:
        ValueError: there is nothing to count.
    """
    if not hits:
        raise ValueError("no example to measure on: raise the preset's held_out")
    return sum(hits) / len(hits)
