"""Aspect-ratio buckets: a few target sizes of about equal area, so that wide pictures lose little.

Own arithmetic: ``diffusers.training_utils.generate_aspect_ratio_buckets`` is newer than the oldest diffusers
that this package supports, and ``find_nearest_bucket`` prefers the bucket of smaller area.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_ASPECT_RATIOS = (
    5 / 4,
    4 / 3,
    3 / 2,
    16 / 9,
    2 / 1,
)  # long side to short side, as cameras and screens have them


def bucket_sizes(resolution: int, divisible_by: int = 64) -> list[tuple[int, int]]:
    """Return the distinct ``(height, width)`` buckets of about ``resolution ** 2`` pixels, tallest first.

    They are the square and, upright and lying, 5:4, 4:3, 3:2, 16:9 and 2:1, with both sides rounded to
    multiples of ``divisible_by``. Where that is at most ``resolution / 8``, areas are within 7% of the square's;
    where it is larger, fewer buckets remain, down to the square alone.

    Raises:
        ValueError: ``resolution`` is not a positive multiple of ``divisible_by``.
    """
    check_resolution(resolution, divisible_by)
    buckets = {(resolution, resolution)}
    for aspect_ratio in _ASPECT_RATIOS:
        short = divisible_by * round(resolution / math.sqrt(aspect_ratio) / divisible_by)
        long = divisible_by * round(resolution**2 / short / divisible_by)
        buckets |= {(short, long), (long, short)}
    return sorted(buckets, key=lambda size: size[0] / size[1], reverse=True)


def nearest_bucket(image_size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the bucket whose aspect ratio is nearest to that of ``image_size`` ``(height, width)``.

    Nearness is the ratio of the two aspect ratios: the share of the picture that the crop keeps.

    Raises:
        ValueError: ``buckets`` is empty.
    """
    aspect = math.log(image_size[0] / image_size[1])
    return min(buckets, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))


def check_resolution(resolution: int, divisible_by: int) -> None:
    """Refuse a resolution that ``divisible_by`` does not divide.

    Raises:
        ValueError: it is not a positive multiple; the message names the nearest that are.
    """
    if resolution > 0 and resolution % divisible_by == 0:
        return
    below = resolution // divisible_by * divisible_by
    valid = f"{below} or {below + divisible_by}" if below > 0 else str(divisible_by)
    raise ValueError(f"resolution {resolution} is not a positive multiple of {divisible_by}; use {valid}")
