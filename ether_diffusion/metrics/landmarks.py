"""Do images keep to a face? Mean distance of its landmarks in pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

POINTS = 68

LandmarkDetector = Callable[[Image.Image], NDArray[np.floating] | None]
"""From a picture to the (68, 2) points (x, y in pixels) of its greatest face; None where it finds none."""


def landmark_distance(points: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """The mean over the points of ‖p - q‖ in pixels, both (n, 2).

    Raises:
        ValueError: they are not as many, or no points of a plane.
    """
    if points.shape != reference.shape or points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"landmarks of the shapes {points.shape} and {reference.shape} cannot be compared")
    return float(np.linalg.norm(points.astype(np.float64) - reference.astype(np.float64), axis=1).mean())


def greatest_face(faces: list[NDArray[np.floating]] | None) -> NDArray[np.floating] | None:
    """The face whose points span the greatest box, in x and y alone; None where there is none."""
    if not faces:
        return None
    return max((face[:, :2] for face in faces), key=lambda face: float(np.prod(np.ptp(face, axis=0))))


def load_face_alignment(device: torch.device | str = "cpu") -> LandmarkDetector:
    """The 68 points that the package face-alignment finds; it fetches its weights when it is first asked.

    Raises:
        ImportError: it is not installed.
        OSError: its weights cannot be fetched.
    """
    try:
        import face_alignment
    except ImportError as error:
        raise ImportError(
            f"landmarks need face-alignment ({error}): pip install 'ether-diffusion[landmarks]'"
        ) from error
    network = face_alignment.FaceAlignment(face_alignment.LandmarksType.TWO_D, device=str(device))

    def detect(image: Image.Image) -> NDArray[np.floating] | None:
        return greatest_face(network.get_landmarks_from_image(np.asarray(image.convert("RGB"))))

    return detect
