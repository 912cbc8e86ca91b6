"""The simulation of intervals, small: what is known of each kind must come out of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ether_diffusion.cli.programs.coverage import main
from ether_diffusion.evaluation import statistics
from ether_diffusion.evaluation.statistics import (
    INTERVALS,
    chosen_by_all,
    chosen_by_others,
    draw_scores,
    simulate,
    studentised,
)

ROUNDS = 300


def test_the_interval_that_is_used_holds_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SUBJECTS", (5,))
    monkeypatch.setattr(statistics, "SHAPES", ("normal",))
    monkeypatch.setattr(statistics, "RESAMPLES", 199)
    found = {row["interval"]: float(row["coverage"]) for row in simulate(ROUNDS)}
    error = (0.95 * 0.05 / ROUNDS) ** 0.5
    assert abs(found["t over subjects (used)"] - 0.95) < 3 * error  # exact for normal scores
    assert found["percentile bootstrap"] < 0.95 - 4 * error
    assert found["t over pairs of subject and seed"] < 0.95 - 4 * error


def test_the_scores_have_the_mean_and_the_deviations_that_are_stated() -> None:
    for shape in ("normal", "skewed"):
        scores = draw_scores(20_000, shape, np.random.default_rng(0))
        assert scores.shape == (20_000, 2)
        assert abs(scores.mean()) < 0.03
        assert (scores[:, 0] - scores[:, 1]).std() == pytest.approx(0.5 * 2**0.5, rel=0.02)
        assert scores.mean(1).var() == pytest.approx(1 + 0.25 / 2, rel=0.05)
    assert stats.skew(draw_scores(20_000, "skewed", np.random.default_rng(0)).mean(1)) > 1
    with pytest.raises(ValueError, match="no such shape"):
        draw_scores(3, "flat", np.random.default_rng(0))


def test_every_interval_is_around_the_mean_and_grows_with_the_scores() -> None:
    scores = draw_scores(8, "normal", np.random.default_rng(1))
    for interval in INTERVALS.values():
        low, high = interval(scores, np.random.default_rng(2))
        assert low < scores.mean() < high
        assert interval(4 * scores, np.random.default_rng(2)) == pytest.approx((4 * low, 4 * high))  # exact in binary
    many = draw_scores(400, "normal", np.random.default_rng(3))
    expected = INTERVALS["t over subjects (used)"](many, np.random.default_rng(0))
    assert studentised(many, np.random.default_rng(4)) == pytest.approx(expected, abs=0.02)


def test_settings_are_chosen_by_all_units_or_by_the_others() -> None:
    """Over all units setting 1 is the best, by the lucky unit 0 alone: the others choose setting 0 for it."""
    scores = np.array([[0.50, 0.64, 0.66], [0.99, 0.58, 0.60], [0.40, 0.70, 0.50]])
    assert chosen_by_all(scores).tolist() == [1, 1, 1]
    assert chosen_by_others(scores).tolist() == [0, 1, 1]


def test_a_choice_by_all_seeds_is_as_sure_as_it_says_and_one_by_the_others_too_sure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "MARGINS", (0.0,))
    rounds = 1000
    found = {(row["choice"], row["settings"]): row for row in statistics.simulate_choice(rounds)}
    error = (0.95 * 0.05 / rounds) ** 0.5
    for settings in (3, 1):
        assert float(found["by all seeds (used)", settings]["coverage"]) > 0.95 - 3 * error
    assert float(found["by the other seeds", 3]["coverage"]) < 0.95 - 3 * error
    flattered = 0.846 / 3**0.5  # the mean of the largest of three normal scores, each the mean of three seeds
    assert float(found["by all seeds (used)", 1]["bias"]) == pytest.approx(flattered, abs=0.08)
    assert abs(float(found["by the other seeds", 1]["bias"])) < 0.08


def test_the_program_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rounds", "2", "--output_dir", str(tmp_path)])
    assert (tmp_path / "coverage.md").read_text().strip() == capsys.readouterr().out.strip()
    with pytest.raises(SystemExit):
        main(["--rounds", "0", "--output_dir", str(tmp_path)])
