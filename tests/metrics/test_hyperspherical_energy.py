"""The hyperspherical energy against scipy's distances and a closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from ether_diffusion.core.functional import dense_reflection, dense_relaxed_reflection
from ether_diffusion.metrics.distances import hyperspherical_energy


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_it_is_twice_the_sum_over_scipys_pairs(chunk: int) -> None:
    rows = weight(50, 12)
    unit = rows.double().numpy() / np.linalg.norm(rows.double().numpy(), axis=1, keepdims=True)
    assert hyperspherical_energy(rows, chunk) == pytest.approx(2 * np.sum(1 / pdist(unit)), rel=1e-12)


def test_the_corners_of_a_cross() -> None:
    """±eᵢ in d dimensions: each has d - 1 pairs of others at √2, and its opposite at 2."""
    axes = torch.eye(5)
    cross = 3 * torch.cat([axes, -axes])
    assert hyperspherical_energy(cross) == pytest.approx(10 * (8 / 2**0.5 + 1 / 2), rel=1e-12)


def test_nearly_parallel_neurons_keep_their_digits() -> None:
    gap = 1e-6
    pair = torch.tensor([[1.0, 0.0], [np.cos(gap), np.sin(gap)]], dtype=torch.float64)
    assert hyperspherical_energy(pair) == pytest.approx(2 / (2 * np.sin(gap / 2)), rel=1e-9)


def test_reflections_leave_it_and_relaxed_ones_do_not() -> None:
    rows = weight(40, 16).double()
    u, v = (torch.randn(2, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (1, 2))
    before = hyperspherical_energy(rows)
    assert hyperspherical_energy(rows @ dense_reflection(u)) == pytest.approx(before, rel=1e-12)
    assert abs(hyperspherical_energy(rows @ dense_relaxed_reflection(u, v)) / before - 1) > 1e-4


def test_what_has_no_energy_is_refused() -> None:
    with pytest.raises(ValueError, match="two neurons"):
        hyperspherical_energy(torch.ones(1, 4))
    with pytest.raises(ValueError, match="same direction"):
        hyperspherical_energy(torch.ones(3, 4))
