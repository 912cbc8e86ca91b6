"""FID against the closed form, KID against the unbiased estimator written out, and whose features they are of."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ether_diffusion.metrics.backbones import Clip, Dino
from ether_diffusion.metrics.distribution import (
    distances,
    frechet_distance,
    kernel_distance,
    load_feature_model,
    too_few,
)


def features(seed: int, count: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64) @ mix + shift


def test_fid_is_the_frechet_distance_of_the_two_gaussians() -> None:
    real, generated = features(0, 80), features(1, 60, 0.5)
    a, b = real.numpy(), generated.numpy()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum()
    expected += np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(real, real + 2) == pytest.approx(6 * 4, rel=1e-6)


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator of Gretton et al. with the kernel (x·y / d + 1)³."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_kid_of_all_images_is_the_unbiased_mmd() -> None:
    real, generated = features(2, 20), features(3, 20, 0.3)
    found = kernel_distance(real, generated)
    assert found["kid"] == pytest.approx(mmd(real.numpy(), generated.numpy()), rel=1e-9)
    assert found == {"kid": found["kid"], "kid_deviation": 0.0, "subset_size": 20, "subsets": 1}


def test_kid_of_subsets_has_the_same_expectation_and_leaves_the_rng_alone() -> None:
    real, generated = features(4, 60), features(5, 60, 0.3)
    whole = kernel_distance(real, generated)["kid"]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = kernel_distance(real, generated, subset_size=20, subsets=400)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == kernel_distance(real, generated, subset_size=20, subsets=400)
    assert found["kid_deviation"] > 0
    assert found["kid"] == pytest.approx(whole, abs=4 * found["kid_deviation"] / 400**0.5)
    with pytest.raises(ValueError, match="subsets of 61 cannot be drawn from 60 and 60"):
        kernel_distance(real, generated, subset_size=61)
    for score in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="not 1 real and 60"):
            score(real[:1], generated)


def test_sets_that_are_too_small_give_no_number() -> None:
    assert too_few(5000, 5000, 2047) == {}
    assert set(too_few(5000, 5000, 5000)) == {"fid"}  # the covariance would be singular
    assert set(too_few(5000, 2047, 384)) == {"fid"}
    few = too_few(255, 5000, 384)
    assert set(few) == {"fid", "kid"}
    assert (
        few["kid"] == "KID is left out: it needs 256 images of each kind, there are 255 real and 5,000 generated images"
    )
    found = distances(features(0, 300), features(1, 300))
    assert math.isnan(found["fid"])
    assert found["kid"] == pytest.approx(float(kernel_distance(features(0, 300), features(1, 300))["kid"]))


def test_features_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load_feature_model("playground"), Dino)
    assert isinstance(load_feature_model("dino:playground"), Dino)
    assert isinstance(load_feature_model("clip:playground"), Clip)
    for name in ("facebook/dino-vits16", "dino:", "vgg:x"):
        with pytest.raises(ValueError, match="none of inception, inception:FILE, dino:NAME, clip:NAME"):
            load_feature_model(name)
    with pytest.raises(FileNotFoundError, match=r"no file .*weights.pth"):
        load_feature_model(f"inception:{tmp_path / 'weights.pth'}")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install 'ether-diffusion\[fid\]', or compare others"):
        load_feature_model("inception")
