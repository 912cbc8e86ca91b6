"""Landmarks: the mean distance by hand, the greatest of several faces, and the package behind them."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.metrics.landmarks import POINTS, greatest_face, landmark_distance, load_face_alignment

FACE = np.random.default_rng(0).random((POINTS, 2)) * 50


def test_the_distance_is_the_mean_over_points() -> None:
    assert landmark_distance(FACE, FACE) == 0
    assert landmark_distance(FACE + np.array([3, 4]), FACE) == pytest.approx(5)
    moved = FACE.copy()
    moved[:34] += [0, 2]
    assert landmark_distance(moved, FACE) == pytest.approx(1)
    for other in (FACE[:5], np.zeros((POINTS, 3))):
        with pytest.raises(ValueError, match="cannot be compared"):
            landmark_distance(other, FACE)


def test_the_greatest_face_counts() -> None:
    found = greatest_face([FACE / 4, FACE * 2, FACE])
    assert found is not None
    assert (found == FACE * 2).all()
    assert greatest_face([]) is None
    assert greatest_face(None) is None


def test_face_alignment_is_asked_for_two_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    class FaceAlignment:
        def __init__(self, kind: str, device: str) -> None:
            assert (kind, device) == ("2D", "cpu")

        def get_landmarks_from_image(self, image: np.ndarray) -> list[np.ndarray] | None:
            assert image.shape == (20, 30, 3)
            return [FACE, FACE / 2] if image.any() else None

    package = ModuleType("face_alignment")
    package.FaceAlignment = FaceAlignment  # type: ignore[attr-defined]
    package.LandmarksType = SimpleNamespace(TWO_D="2D")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "face_alignment", package)
    detect = load_face_alignment()
    found = detect(Image.new("L", (30, 20), 200))
    assert found is not None
    assert (found == FACE).all()
    assert detect(Image.new("RGB", (30, 20))) is None
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    with pytest.raises(ImportError, match=r"pip install 'ether-diffusion\[landmarks\]'"):
        load_face_alignment()
