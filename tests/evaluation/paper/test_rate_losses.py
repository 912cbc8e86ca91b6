"""What a wrong rate costs, against sums by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from ether_diffusion.evaluation.paper.rate_losses import compare_losses, rate_losses, write_losses
from ether_diffusion.evaluation.paper.settings import RatesConfig
from ether_diffusion.evaluation.subjects.summary import BY_KEY

DINO = BY_KEY["dino"]
TUNED = {"ether_plus": 1e-2, "lora": 1e-3}
AT_TEN = {"ether_plus": (0.5, 0.4, 0.3), "lora": (0.1, 0.2, 0.0)}


def result(arm: str, rate: float | None, subject: str, value: float, seed: int = 0) -> dict[str, Any]:
    images = [{"file": "0.png", "prompt": "p", "dino": value}]
    return {"arm": arm, "learning_rate": rate, "subject": subject, "seed": seed, "judges": {}, "images": images}


def results() -> list[dict[str, Any]]:
    found = [result("base", None, subject, 0.1) for subject in "abc"]
    for arm, right in TUNED.items():
        found += [result(arm, right, subject, 0.6) for subject in "abc"]
        found += [result(arm, 10 * right, subject, value) for subject, value in zip("abc", AT_TEN[arm], strict=True)]
    return found


def test_losses_are_taken_from_the_rate_that_was_found() -> None:
    found = {(loss.arm, loss.factor): loss for loss in rate_losses(results(), TUNED, DINO)}
    assert list(found) == [("ether_plus", 1), ("ether_plus", 10), ("lora", 1), ("lora", 10)]
    ours = found["ether_plus", 10]
    assert ours.by_subject == pytest.approx({"a": 0.1, "b": 0.2, "c": 0.3})
    assert ours.mean.mean == pytest.approx(0.2)
    assert ours.share == pytest.approx(0.2 / 0.5)
    assert found["lora", 10].share == pytest.approx(1.0)
    assert found["lora", 1].mean.mean == 0


def test_a_training_that_diverged_leaves_the_base() -> None:
    known = [each for each in results() if (each["arm"], each["learning_rate"], each["subject"]) != ("lora", 1e-2, "a")]
    known.append({**result("lora", 1e-2, "a", 0.0), "diverged": "NaN", "images": []})
    (loss,) = [each for each in rate_losses(known, TUNED, DINO) if (each.arm, each.factor) == ("lora", 10)]
    assert loss.by_subject["a"] == pytest.approx(0.6 - 0.1)
    assert loss.diverged == 1


def test_seeds_of_a_subject_are_averaged() -> None:
    known = [*results(), result("lora", 1e-2, "a", 0.5, seed=1)]
    (loss,) = [each for each in rate_losses(known, TUNED, DINO) if (each.arm, each.factor) == ("lora", 10)]
    assert loss.by_subject["a"] == pytest.approx(0.6 - 0.3)


def test_the_others_are_compared_with_one_by_subject() -> None:
    (found,) = compare_losses(rate_losses(results(), TUNED, DINO), 10, "ether_plus")
    t = stats.ttest_rel([0.5, 0.4, 0.6], [0.1, 0.2, 0.3])
    assert (found.arm, found.rival) == ("lora", "ether_plus")
    assert found.difference.mean == pytest.approx(0.3)
    assert found.p_holm == pytest.approx(t.pvalue)


def test_what_is_written(tmp_path: Path) -> None:
    text = write_losses(tmp_path, results(), TUNED, DINO, 10, "ether_plus")
    assert "| lora | 0.001 | +0.500" in text
    assert "100%" in text
    assert (tmp_path / "losses.md").read_text() == text
    written = json.loads((tmp_path / "losses.json").read_text())
    assert written["losses"][1]["by_subject"] == pytest.approx({"a": 0.1, "b": 0.2, "c": 0.3})
    assert written["comparisons"][0]["difference"]["units"] == 3


def test_a_rate_that_was_not_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora was not run at 0.5; it was at 0.001, 0.01"):
        rate_losses(results(), {"lora": 0.5}, DINO)
    with pytest.raises(ValueError, match="ether_plus has no results at 3 times its rate"):
        compare_losses(rate_losses(results(), TUNED, DINO), 3, "ether_plus")
    with pytest.raises(ValueError, match="tuned_rates names dora, which is no arm: lora"):
        RatesConfig(
            output_dir=tmp_path,
            training={"pretrained_model_name_or_path": "playground"},
            arms={"lora": {}},
            tuned_rates={"dora": 1e-3},
        )
