"""Are generated images distributed as real ones? FID (arXiv 1706.08500) and KID (arXiv 1801.01401), by torchmetrics.

Both compare features, each image passing its model once; whose features, with which weights, is part of the result.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ether_diffusion.metrics.backbones import Backbone, Dino, load_clip
from ether_diffusion.metrics.names import INCEPTION
from ether_diffusion.pipelines.file import first_line
from ether_diffusion.playground import NAME

FID_ENOUGH, KID_ENOUGH = 2048, 256
"""The fewest images of each set for FID and for KID. FID also needs more images than features have dimensions, since
its covariance is singular otherwise; its bias is small only above some thousands. KID has no bias, but its standard
error, which falls with 1/n for sets that are alike, exceeds what methods differ by in small sets. Where to draw that
line is a convention."""
SUBSET_SIZE, SUBSETS = 1000, 100
"""Of KID, where there are so many images."""


class Inception(Backbone):
    """InceptionV3's 2048 pooled features, as torch-fidelity has them: the TensorFlow weights and resize of 2015.

    Args:
        weights: file of torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``; None to fetch it.
        device: where to compute.

    Raises:
        ImportError: torch-fidelity, or the torchvision that it needs, is not installed.
        OSError: there is no such file, or it cannot be fetched.
        ValueError: the file holds other weights.
    """

    def __init__(self, weights: str | None = None, device: torch.device | str = "cpu") -> None:
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"there is no file {weights} with torch-fidelity's weights of InceptionV3")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # the latter where torchvision is of another build than torch
            raise ImportError(
                f"Inception's features need torch-fidelity and torchvision ({error}): pip install "
                "'ether-diffusion[fid]', or compare others, such as --fid_features dino:facebook/dino-vits16"
            ) from error
        try:
            model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
        except (RuntimeError, KeyError, EOFError, UnpicklingError) as error:
            raise ValueError(
                f"{weights} does not hold torch-fidelity's weights of InceptionV3: {first_line(error)}"
            ) from error
        name = INCEPTION if weights is None else f"{INCEPTION}:{weights}"
        super().__init__(name, model, "torch-fidelity: 299 x 299, TensorFlow's bilinear", device)

    def _batches(self, images: Any, show: str | None) -> Any:
        """One by one: the network itself brings them to its size, and theirs may differ."""
        for image in images:
            yield from super()._batches([image], None)

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model(pixels)[0].cpu()
        return features


def load_feature_model(name: str, device: torch.device | str = "cpu") -> Backbone:
    """The model whose features FID and KID compare.

    Args:
        name: ``inception``, ``inception:FILE``, ``dino:NAME`` or ``clip:NAME`` (NAME: Hub id, folder or playground);
            ``playground`` is its DINO.
        device: where to compute.

    Raises:
        ImportError: a package is missing.
        OSError: there is no such model, or it cannot be fetched.
        ValueError: the name says of no kind of model.
    """
    kind, _, model = (f"dino:{name}" if name == NAME else name).partition(":")
    if kind == INCEPTION:
        return Inception(model or None, device)
    if kind == "dino" and model:
        return Dino(model, device)
    if kind == "clip" and model:
        return load_clip(model, device)
    raise ValueError(f"features {name!r} are none of inception, inception:FILE, dino:NAME, clip:NAME and playground")


class _Given(nn.Module):
    """In the place of a network: the features themselves."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """FID: ‖μ - μ'‖² + tr(Σ + Σ' - 2 (Σ Σ')^½) of two sets of features (N, d) and (M, d), in fp64.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: a set has fewer than two.
    """
    _check_sets(real, generated)
    metric = _torchmetrics("fid").FrechetInceptionDistance(_Given(real.shape[1]))
    for features, is_real in ((real, True), (generated, False)):
        metric.update(features.double(), real=is_real)
    return float(metric.compute())


def kernel_distance(
    real: Tensor, generated: Tensor, subset_size: int | None = None, subsets: int = SUBSETS, seed: int = 0
) -> dict[str, float | int]:
    """KID: the unbiased squared MMD with the kernel (x·y / d + 1)³, its mean over random subsets, in fp64.

    Unlike FID its expectation does not depend on the number of images; it may be below 0 where the sets are alike.

    Args:
        real: features (N, d).
        generated: features (M, d).
        subset_size: drawn from each set at a time; None for 1000, or all of the smaller set where there are fewer.
        subsets: how often.
        seed: of the draws.

    Returns:
        ``kid``, ``kid_deviation``, ``subset_size`` and ``subsets``.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: a set has fewer than two, or than a subset has.
    """
    _check_sets(real, generated)
    smaller = min(len(real), len(generated))
    size = min(SUBSET_SIZE, smaller) if subset_size is None else subset_size
    if not 2 <= size <= smaller:
        raise ValueError(f"KID's subsets of {size} cannot be drawn from {len(real)} and {len(generated)} images")
    if size == len(real) == len(generated):
        subsets = 1  # all would be the same
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features
        metric = _torchmetrics("kid").KernelInceptionDistance(_Given(real.shape[1]), subsets=subsets, subset_size=size)
    for features, is_real in ((real, True), (generated, False)):
        metric.update(features.double(), real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return {"kid": float(mean), "kid_deviation": float(deviation), "subset_size": size, "subsets": subsets}


def distances(real: Tensor, generated: Tensor, subset_size: int | None = None) -> dict[str, float]:
    """``fid`` and ``kid`` of two sets of features (N, d) and (M, d), each NaN where :func:`too_few` says so.

    The sets must be unrelated. Pictures that were drawn for the conditions of the very images that they are compared
    with are nearer to these than two samples of one distribution are: KID then falls below zero.

    Args:
        real: features of real images.
        generated: of generated ones.
        subset_size: of :func:`kernel_distance`.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    missing = too_few(len(real), len(generated), real.shape[1])
    return {
        "fid": math.nan if "fid" in missing else frechet_distance(real, generated),
        "kid": math.nan if "kid" in missing else float(kernel_distance(real, generated, subset_size)["kid"]),
    }


def too_few(real: int, generated: int, dimensions: int = 0) -> dict[str, str]:
    """Which of ``fid`` and ``kid`` so few images cannot give with features of so many dimensions, and why."""
    fewest, of_fid = min(real, generated), max(FID_ENOUGH, dimensions + 1)
    sets = f"there are {real:,} real and {generated:,} generated images"
    found = {}
    if fewest < of_fid:
        found["fid"] = f"FID is left out: it needs {of_fid:,} images of each kind with these features, {sets}"
    if fewest < KID_ENOUGH:
        found["kid"] = f"KID is left out: it needs {KID_ENOUGH:,} images of each kind, {sets}"
    return found


def _check_sets(real: Tensor, generated: Tensor) -> None:
    if min(len(real), len(generated)) < 2:
        raise ValueError(
            f"FID and KID need two images of each kind, not {len(real)} real and {len(generated)} generated"
        )


def _torchmetrics(name: str) -> Any:
    try:
        from torchmetrics.image import fid, kid
    except ImportError as error:
        raise ImportError(f"FID and KID need torchmetrics ({error}): pip install 'ether-diffusion[eval]'") from error
    return {"fid": fid, "kid": kid}[name]
