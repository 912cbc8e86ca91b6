from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from ether_diffusion.data.augment import Augmentation, augment, cover_size, is_deterministic
from ether_diffusion.data.randomness import generator

CENTER = Augmentation(center_crop=True)


def coordinates(height: int, width: int) -> Image.Image:
    """A picture whose red is the row and green the column, so that a crop says where it was cut."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8))


def to_bytes(pixel_values: torch.Tensor) -> npt.NDArray[np.uint8]:
    return ((pixel_values + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_black_and_white_are_minus_one_and_one() -> None:
    picture = Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8))
    pixel_values = augment(picture, (1, 1), CENTER, generator(0)).pixel_values
    assert pixel_values.dtype == torch.float32
    assert pixel_values.shape == (3, 1, 1)
    torch.testing.assert_close(pixel_values.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_center_crop_is_the_middle_of_the_picture() -> None:
    augmented = augment(coordinates(8, 14), (8, 8), CENTER, generator(0))
    assert augmented.original_size == (8, 14)
    assert augmented.crop_top_left == (0, 3)
    np.testing.assert_array_equal(to_bytes(augmented.pixel_values), np.asarray(coordinates(8, 14))[:, 3:11])


def test_every_offset_of_a_random_crop_is_reached_equally_often() -> None:
    picture, n = coordinates(8, 13), 1200
    seen: Counter[int] = Counter()
    for counter in range(n):
        augmented = augment(picture, (8, 8), Augmentation(), generator(0, counter))
        top, left = augmented.crop_top_left
        assert to_bytes(augmented.pixel_values)[0, 0].tolist() == [top, left, 0]
        seen[left] += 1
    assert set(seen) == set(range(6))
    chi_squared = sum((count - n / 6) ** 2 / (n / 6) for count in seen.values())
    assert chi_squared < 20.5  # 5 degrees of freedom, p = 0.001


def test_random_crop_moves_vertically_in_a_tall_picture() -> None:
    offsets = {augment(coordinates(11, 8), (8, 8), Augmentation(), generator(i)).crop_top_left for i in range(60)}
    assert offsets == {(0, 0), (1, 0), (2, 0), (3, 0)}


def test_flip_mirrors_half_of_the_pictures_and_their_crop() -> None:
    settings = Augmentation(random_flip=True)
    mirrored_picture = np.asarray(coordinates(8, 13))[:, ::-1]
    n_flipped, n = 0, 400
    for counter in range(n):
        augmented = augment(coordinates(8, 13), (8, 8), settings, generator(0, counter))
        shown = mirrored_picture if augmented.flipped else np.asarray(coordinates(8, 13))
        left = augmented.crop_top_left[1]
        np.testing.assert_array_equal(to_bytes(augmented.pixel_values), shown[:, left : left + 8])
        n_flipped += augmented.flipped
    assert abs(n_flipped - n / 2) < 4 * (n / 4) ** 0.5


@pytest.mark.parametrize("image_size", [(40, 64), (64, 40), (9, 23), (300, 17)])
def test_resize_is_lanczos_from_the_full_picture(image_size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*image_size, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    scale = max(16 / image_size[0], 24 / image_size[1])
    height, width = round(image_size[0] * scale), round(image_size[1] * scale)
    top, left = (height - 16) // 2, (width - 24) // 2
    expected = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    augmented = augment(picture, (16, 24), CENTER, generator(0))
    assert augmented.crop_top_left == (top, left)
    np.testing.assert_array_equal(to_bytes(augmented.pixel_values), expected[top : top + 16, left : left + 24])


def test_covering_size_is_the_smallest_that_keeps_the_aspect_ratio() -> None:
    assert cover_size((1000, 2000), (512, 512)) == (512, 1024)
    assert cover_size((2000, 1000), (512, 512)) == (1024, 512)
    assert cover_size((100, 100), (384, 704)) == (704, 704)
    for height in range(1, 60):
        for width in range(1, 60):
            resized = cover_size((height, width), (24, 16))
            assert resized[0] == 24 or resized[1] == 16
            assert resized[0] >= 24
            assert resized[1] >= 16
            scale = max(24 / height, 16 / width)
            assert abs(resized[0] - height * scale) <= 0.5 + 1e-9
            assert abs(resized[1] - width * scale) <= 0.5 + 1e-9


@pytest.mark.parametrize("image_size", [(8, 8), (16, 16), (8, 14), (11, 8)])
@pytest.mark.parametrize("center_crop", [False, True])
@pytest.mark.parametrize("random_flip", [False, True])
def test_deterministic_is_what_never_varies(image_size: tuple[int, int], center_crop: bool, random_flip: bool) -> None:
    settings = Augmentation(center_crop, random_flip)
    picture = coordinates(*image_size)
    tensors = [augment(picture, (8, 8), settings, generator(i)).pixel_values for i in range(30)]
    never_varies = all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    assert is_deterministic(image_size, (8, 8), settings) == never_varies


def test_settings_do_not_shift_later_draws() -> None:
    later = set()
    for settings in (Augmentation(), CENTER, Augmentation(random_flip=True)):
        random = generator(3)
        augment(coordinates(8, 14), (8, 8), settings, random)
        later.add(torch.rand(1, generator=random).item())
    assert len(later) == 1


def test_picture_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode L.*load_image"):
        augment(Image.new("L", (8, 8)), (8, 8), CENTER, generator(0))
