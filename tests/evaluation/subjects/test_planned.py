"""Planned comparisons, against scipy and sums by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from scipy import stats

from ether_diffusion.evaluation.figures import Difference
from ether_diffusion.evaluation.statistics import holm
from ether_diffusion.evaluation.subjects import planned
from ether_diffusion.evaluation.subjects.planned import draw_planned, planned_comparisons, scores_of_cell, write_planned
from ether_diffusion.evaluation.subjects.settings import BenchmarkConfig, cell_of
from ether_diffusion.evaluation.subjects.summary import BY_KEY

DINO = BY_KEY["dino"]
SCORES = {
    ("mine", 1e-2): (0.5, 0.4, 0.7),
    ("mine", 1e-1): (0.3, 0.4, 0.2),
    ("other", 1e-2): (0.1, 0.2, 0.3),
    ("other", 1e-1): (0.2, 0.1, 0.1),
}
CONFIGS = Path(__file__).parents[3] / "configs"


def result(arm: str, rate: float | None, subject: str, value: float, seed: int = 0) -> dict[str, Any]:
    images = [{"file": "0.png", "prompt": "p", "dino": value}]
    return {"arm": arm, "learning_rate": rate, "subject": subject, "seed": seed, "judges": {}, "images": images}


def results() -> list[dict[str, Any]]:
    found = [result("base", None, subject, 0.05) for subject in "abc"]
    for (arm, rate), values in SCORES.items():
        found += [result(arm, rate, subject, value) for subject, value in zip("abc", values, strict=True)]
    return found


def test_comparisons_are_paired_by_subject_and_corrected_for_each_other() -> None:
    planned = {"low": [["mine@1e-2"], ["other@0.01"]], "high": [["mine@0.1"], ["other@1e-1"]]}
    found = planned_comparisons(results(), planned, DINO)
    assert [each.arm for each in found] == ["low", "high"]
    assert found[0].difference.mean == pytest.approx((0.4 + 0.2 + 0.4) / 3)
    p = [
        stats.ttest_rel(SCORES["mine", 1e-2], SCORES["other", 1e-2]).pvalue,
        stats.ttest_rel(SCORES["mine", 1e-1], SCORES["other", 1e-1]).pvalue,
    ]
    assert [each.p_holm for each in found] == pytest.approx(holm(p))


def test_of_several_cells_the_mean_of_each_subject_counts() -> None:
    (found,) = planned_comparisons(results(), {"both": [["mine@1e-2", "mine@1e-1"], ["other@1e-2"]]}, DINO)
    mine = [(low + high) / 2 for low, high in zip(SCORES["mine", 1e-2], SCORES["mine", 1e-1], strict=True)]
    assert found.difference.p == pytest.approx(stats.ttest_rel(mine, SCORES["other", 1e-2]).pvalue)


def test_a_training_that_diverged_counts_as_the_base() -> None:
    known = [each for each in results() if (each["arm"], each["learning_rate"], each["subject"]) != ("mine", 1e-1, "a")]
    known.append({**result("mine", 1e-1, "a", 0.0), "diverged": "NaN", "images": []})
    assert scores_of_cell(known, "mine@1e-1", DINO) == pytest.approx({"a": 0.05, "b": 0.4, "c": 0.2})


def test_what_was_not_run_is_told() -> None:
    with pytest.raises(ValueError, match=r"no results of mine@0\.5"):
        scores_of_cell(results(), "mine@0.5", DINO)


def test_what_is_written(tmp_path: Path) -> None:
    low, high = {"low": [["mine@1e-2"], ["other@1e-2"]]}, {"high": [["mine@1e-1"], ["other@1e-1"]]}
    text = write_planned(tmp_path, results(), low, high, DINO)
    assert text == (tmp_path / "planned.md").read_text()
    assert "| low | +0.333" in text
    assert "Not tested" in text
    content = json.loads((tmp_path / "planned.json").read_text())
    assert content["planned"][0]["difference"]["mean"] == pytest.approx(1 / 3)
    assert [each["arm"] for each in content["secondary"]] == ["high"]
    with Image.open(tmp_path / "planned.png") as figure:
        assert figure.format == "PNG"


def test_the_figure_has_the_difference_of_every_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Difference] = []
    monkeypatch.setattr(planned, "write_differences", lambda path, rows, label: drawn.extend(rows))
    low, high = {"low": [["mine@1e-2"], ["other@1e-2"]]}, {"high": [["mine@1e-1"], ["other@1e-1"]]}
    draw_planned(tmp_path / "planned.png", results(), low, high, DINO)
    assert drawn[0].values == pytest.approx([0.4, 0.2, 0.4])
    assert [row.tested for row in drawn] == [True, False]
    assert drawn[0].told == "p = 0.038, separated"  # (1/3) / ((.2 / sqrt(3)) / sqrt(3)) = 5 with two degrees of freedom
    assert drawn[1].told == "not tested"


def test_comparisons_without_a_test_are_written_alone(tmp_path: Path) -> None:
    text = write_planned(tmp_path, results(), {}, {"high": [["mine@1e-1"], ["other@1e-1"]]}, DINO)
    assert text.startswith("Not tested")
    assert "| high | +0.167" in text


@pytest.mark.parametrize(
    ("sides", "told"),
    [
        ([["mine"]], "needs two lists of arms"),
        ([["mine"], []], "needs two lists of arms"),
        ([["mine"], ["unknown@1e-2"]], "of no arm: mine"),
        ([["mine"], ["mine@fast"]], "write arm or arm@rate"),
        ([["mine@0.1"], ["mine@1e-2"]], "names 'mine@0.1', which mine is not trained at: its rates are 0.01, 0.3"),
        ([["mine@0.3"], ["own@6e-3"]], "which own is not trained at: it names no rate"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_anything_runs(
    tmp_path: Path, sides: list[list[str]], told: str
) -> None:
    training = {"pretrained_model_name_or_path": "playground"}
    arms = {"mine": {"learning_rate": ["1e-2", 0.3]}, "own": {}}
    with pytest.raises(ValueError, match=told):
        BenchmarkConfig(tmp_path, arms=arms, training=training, planned={"a": sides})


def test_a_rate_that_all_arms_share_can_be_named(tmp_path: Path) -> None:
    training = {"pretrained_model_name_or_path": "playground", "learning_rate": "1e-2"}
    sides = [["mine@0.01"], ["other"]]
    config = BenchmarkConfig(tmp_path, arms={"mine": {}, "other": {}}, training=training, secondary={"a": sides})
    assert config.rates_of("mine") == [0.01]


@pytest.mark.parametrize("name", ["unit_length", "initial_length", "blocks_rates", "energy", "layers", "anchored"])
def test_the_plans_of_the_studies_name_arms_and_rates_that_are_run(name: str) -> None:
    settings = yaml.safe_load((CONFIGS / f"eval_{name}.yaml").read_text())
    comparisons = {**settings["planned"], **settings.get("secondary", {})}
    for cell in (cell for sides in comparisons.values() for side in sides for cell in side):
        arm, rate = cell_of(cell)
        assert (
            rate is None
            or rate in settings["arms"][arm.removesuffix(", orthogonal").removesuffix(", row norms")]["learning_rate"]
        )
    assert all(len(side[0]) == len(side[1]) for side in settings["planned"].values())
