from __future__ import annotations

import pytest

from ether_diffusion.data.buckets import bucket_sizes, nearest_bucket


@pytest.mark.parametrize(
    ("resolution", "divisible_by"), [(64, 8), (256, 8), (512, 8), (512, 64), (768, 64), (1024, 64)]
)
def test_buckets_have_about_the_area_of_the_square(resolution: int, divisible_by: int) -> None:
    buckets = bucket_sizes(resolution, divisible_by)
    assert (resolution, resolution) in buckets
    assert len(buckets) == len(set(buckets)) >= 5
    assert {(width, height) for height, width in buckets} == set(buckets)
    for height, width in buckets:
        assert height % divisible_by == width % divisible_by == 0
        assert abs(height * width / resolution**2 - 1) < 0.07


def test_area_bound_of_the_docstring_holds_at_every_resolution() -> None:
    for divisible_by in (8, 16, 64):
        for resolution in range(8 * divisible_by, 2049, divisible_by):
            for height, width in bucket_sizes(resolution, divisible_by):
                assert abs(height * width / resolution**2 - 1) < 0.07


def test_fine_grid_has_the_aspect_ratios_of_cameras() -> None:
    assert bucket_sizes(512, 8)[5:] == [(512, 512), (456, 576), (440, 592), (416, 632), (384, 680), (360, 728)]


def test_tiny_resolution_keeps_the_square_only() -> None:
    assert bucket_sizes(64, 64) == [(64, 64)]


def test_picture_goes_to_the_bucket_that_keeps_most_of_it() -> None:
    buckets = bucket_sizes(512, 64)
    for height in range(50, 200, 7):
        for width in range(50, 200, 7):

            def kept(bucket: tuple[int, int], height: int = height, width: int = width) -> float:
                scale = max(bucket[0] / height, bucket[1] / width)
                return bucket[0] * bucket[1] / (height * scale * width * scale)

            chosen = nearest_bucket((height, width), buckets)
            assert kept(chosen) == pytest.approx(max(map(kept, buckets)), rel=1e-9)


@pytest.mark.parametrize(
    ("resolution", "advice"), [(500, "448 or 512"), (63, "use 64"), (0, "use 64"), (-64, "use 64")]
)
def test_resolution_off_the_grid_names_the_nearest(resolution: int, advice: str) -> None:
    with pytest.raises(ValueError, match=rf"resolution {resolution} .* 64; .*{advice}"):
        bucket_sizes(resolution, 64)


def test_no_buckets_are_refused() -> None:
    with pytest.raises(ValueError):
        nearest_bucket((64, 64), [])
