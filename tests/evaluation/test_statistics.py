"""Intervals, paired differences and corrections against scipy, closed forms and each other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from ether_diffusion.evaluation.statistics import (
    against_leader,
    compare,
    holm,
    mean_interval,
    paired_difference,
    share_interval,
)

VALUES = [0.31, 0.52, 0.44, 0.69, 0.12, 0.40]


def test_the_interval_is_students() -> None:
    found = mean_interval(VALUES)
    expected = stats.ttest_1samp(VALUES, 0)
    interval = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(VALUES))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(expected.pvalue)
    assert found.units == 6
    two = mean_interval([1.0, 3.0])
    assert two.high == pytest.approx(2 + math.tan(0.475 * math.pi))  # t with one degree of freedom is Cauchy's


def test_the_interval_does_not_depend_on_the_order() -> None:
    assert len({mean_interval(order) for order in itertools.permutations(VALUES)}) == 1


def test_one_unit_has_no_interval() -> None:
    found = mean_interval([0.4])
    assert (found.mean, found.low, found.high, found.p, found.units) == (0.4, None, None, None, 1)


def test_equal_values_have_an_interval_without_width() -> None:
    assert (mean_interval([0.5, 0.5]).low, mean_interval([0.5, 0.5]).p) == (0.5, 0.0)
    assert mean_interval([0.0, 0.0]).p == 1.0


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf]])
def test_values_that_have_no_mean_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite values"):
        mean_interval(values)


def test_a_difference_is_paired_by_the_names_of_the_units() -> None:
    first = {"dog": 0.5, "cat": 0.9, "box": 0.2, "only here": 7.0}
    second = {"box": 0.1, "cat": 0.7, "dog": 0.2, "only there": -7.0}
    found = paired_difference(first, second)
    expected = stats.ttest_rel([0.5, 0.9, 0.2], [0.2, 0.7, 0.1])
    assert found.p == pytest.approx(expected.pvalue)
    assert found.mean == pytest.approx(0.2)
    assert found.units == 3
    backwards = paired_difference(second, first)
    assert (backwards.low, backwards.high) == pytest.approx((-found.high, -found.low))  # type: ignore[operator]
    with pytest.raises(ValueError, match="nothing in common"):
        paired_difference({"a": 1.0}, {"b": 1.0})


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 p, then 2 p, then never below the last
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    for order in itertools.permutations([0.001, 0.02, 0.02, 0.5]):
        assert dict(zip(order, holm(order), strict=True)) == pytest.approx({0.001: 0.004, 0.02: 0.06, 0.5: 0.5})


def test_the_leader_is_held_against_every_other_arm_and_the_nearest_comes_first() -> None:
    rng = np.random.default_rng(0)
    subjects = [f"s{number}" for number in range(8)]
    level = dict(zip(subjects, rng.normal(0, 0.2, 8), strict=True))
    arms = {
        name: {subject: level[subject] + mean + rng.normal(0, 0.01) for subject in subjects}
        for name, mean in (("low", 0.1), ("high", 0.5), ("near", 0.501))
    }
    near, low = against_leader(arms)
    assert [(each.arm, each.rival) for each in (near, low)] == [("high", "near"), ("high", "low")]
    values = {name: [of_arm[subject] for subject in subjects] for name, of_arm in arms.items()}
    raw = [stats.ttest_rel(values["high"], values[name]).pvalue for name in ("near", "low")]
    assert [near.p_holm, low.p_holm] == pytest.approx(holm(raw))
    assert low.separated  # although the subjects differ by more than the methods do
    assert not near.separated
    assert against_leader({}) == []
    assert against_leader({"one": {"dog": 0.3}}) == []


def test_a_comparison_of_single_units_has_no_p_and_does_not_count_for_the_others() -> None:
    arms = {"a": {"x": 1.0, "y": 2.0, "z": 3.5}, "b": {"x": 0.5, "y": 1.0, "z": 3.0}, "c": {"x": 0.0}, "d": {"w": 0.0}}
    first, second = compare(arms, [("a", "b"), ("a", "c"), ("a", "d")])
    assert first.p_holm == first.difference.p
    assert (second.p_holm, second.separated) == (None, False)


@pytest.mark.parametrize(("won", "count"), [(0, 5), (3, 5), (5, 5), (1, 2), (17, 40)])
def test_the_interval_of_whole_wins_is_clopper_and_pearsons(won: int, count: int) -> None:
    expected = stats.binomtest(won, count).proportion_ci(0.95, "exact")
    found = share_interval([1.0] * won + [0.0] * (count - won))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == won / count


def test_shares_that_all_units_agree_on_have_an_interval_all_the_same() -> None:
    found = share_interval([1.0] * 4)
    assert found.high == 1
    assert found.low == pytest.approx(0.025 ** (1 / 4))
    assert share_interval([0.5]).low is None


@pytest.mark.parametrize("values", [[], [1.2], [-0.1, 0.5], [math.nan]])
def test_shares_outside_of_their_range_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        share_interval(values)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("seeds", [1, 4])
def test_the_interval_of_shares_holds_the_truth_at_least_as_often_as_it_says(share: float, seeds: int) -> None:
    """Shares of prompts that differ, each of a few votes, the same for all seeds of a prompt or independent."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        level = rng.beta(4 * share, 4 * (1 - share), 12)
        values = rng.binomial(seeds, level) / seeds
        found = share_interval(values)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= share <= found.high
    assert held >= 0.95 * 2000 - 2 * math.sqrt(2000 * 0.95 * 0.05)
