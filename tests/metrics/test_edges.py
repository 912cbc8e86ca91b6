"""Edges: F1 and IoU as torchmetrics has them, MS-SSIM against its formula, detectors from a package or none."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

from ether_diffusion.metrics.edges import WINDOW, edge_agreement, greatest_scales, load_edge_detector, ms_ssim


def test_f1_and_iou_are_torchmetrics() -> None:
    dice = np.random.default_rng(0)
    edges, reference = dice.random((2, 40, 50)) < 0.2
    found = edge_agreement(edges, reference)
    pair = torch.from_numpy(edges).int(), torch.from_numpy(reference).int()
    assert found["f1"] == pytest.approx(binary_f1_score(*pair).item(), abs=1e-6)
    assert found["iou"] == pytest.approx(binary_jaccard_index(*pair).item(), abs=1e-6)


def test_no_edges_on_both_sides_agree_and_on_one_side_do_not() -> None:
    none, some = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    assert edge_agreement(none, none) == {"f1": 1.0, "iou": 1.0}
    assert edge_agreement(some, none) == edge_agreement(none, some) == {"f1": 0.0, "iou": 0.0}
    assert edge_agreement(some, some) == {"f1": 1.0, "iou": 1.0}
    assert edge_agreement(np.roll(some, 1, 0), some)["f1"] == 0.0  # no tolerance
    with pytest.raises(ValueError, match=r"\(4, 4\) pixels cannot be compared"):
        edge_agreement(none, np.zeros((4, 5), bool))


def soft(seed: int, side: int) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).random((side, side)), 2)
    return (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)


def test_one_scale_is_the_mean_of_ssim() -> None:
    x, y = soft(1, 64), soft(1, 64) // 2 + soft(2, 64) // 2
    a, b = x / 255.0, y / 255.0

    def blur(image: np.ndarray) -> np.ndarray:  # a Gaussian of deviation 1.5 on 11 pixels, mirrored at the borders
        return gaussian_filter(image, 1.5, mode="mirror", radius=WINDOW // 2)

    c1, c2 = 0.01**2, 0.03**2
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    ssim = ((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert ms_ssim(x, y, 1) == pytest.approx(ssim.mean(), abs=1e-5)


def test_ms_ssim_is_one_for_the_same_edges_and_falls_with_the_difference() -> None:
    edges = soft(3, 192)
    assert ms_ssim(edges, edges) == 1.0
    near, far = (
        ms_ssim(edges, np.clip(edges + step * soft(4, 192).astype(int), 0, 255).astype(np.uint8)) for step in (0.1, 0.5)
    )
    assert 1 > near > far > 0


def test_small_pictures_have_fewer_scales_and_the_error_says_how_many() -> None:
    assert [greatest_scales(side) for side in (10, 21, 22, 64, 98, 99, 175, 176, 512)] == [1, 1, 2, 3, 3, 4, 4, 5, 5]
    with pytest.raises(ValueError, match=r"64 x 64 pixels has 1 to 3 scales, not 5; --ms_ssim_scales 3 fits"):
        ms_ssim(soft(0, 64), soft(0, 64))
    for side in (22, 44, 99, 176):
        assert ms_ssim(soft(0, side), soft(0, side), greatest_scales(side)) == 1.0
    with pytest.raises(ValueError, match="cannot be compared"):
        ms_ssim(soft(0, 64), soft(0, 32))


def test_detectors_are_controlnet_auxs_at_the_pictures_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    class HEDdetector:
        @classmethod
        def from_pretrained(cls, name: str) -> HEDdetector:
            asked["weights"] = name
            return cls()

        def to(self, device: str) -> HEDdetector:
            asked["device"] = device
            return self

        def __call__(self, image: Image.Image, detect_resolution: int, image_resolution: int) -> Image.Image:
            asked["sides"] = (image.mode, detect_resolution, image_resolution)
            return image.convert("L")

    package = ModuleType("controlnet_aux")
    package.HEDdetector = HEDdetector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "controlnet_aux", package)
    assert load_edge_detector("hed")(Image.new("RGBA", (30, 20))).size == (30, 20)
    assert asked == {"weights": "lllyasviel/Annotators", "device": "cpu", "sides": ("RGB", 20, 20)}
    with pytest.raises(ValueError, match=r"no edge detector 'sobel'; there are hed, lineart"):
        load_edge_detector("sobel")
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    with pytest.raises(ImportError, match=r"pip install controlnet-aux, or give the folder"):
        load_edge_detector("hed")
