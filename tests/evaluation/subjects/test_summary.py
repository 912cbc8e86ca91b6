"""The tables against means and intervals computed by hand or by scipy."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ether_diffusion.evaluation.runner import Job
from ether_diffusion.evaluation.subjects.protocols import Subject
from ether_diffusion.evaluation.subjects.summary import REAL, best_rates, comparisons, primary, summarize
from ether_diffusion.evaluation.tables import scores_table, summary_text, write_summary


def result(arm: str, rate: float | None, subject: str, seed: int, values: list[float]) -> dict[str, Any]:
    images = [{"file": f"{n}.png", "prompt": "p", "dino": value, "clip_t": value / 2} for n, value in enumerate(values)]
    more = {} if arm == "base" else {"trained_parameters": {"unet": 7}}
    return {"arm": arm, "learning_rate": rate, "subject": subject, "seed": seed, "judges": {}, "images": images} | more


def test_subjects_count_alike_however_many_images_they_have() -> None:
    rows = summarize(
        [
            result("lora", 1e-3, "dog", 0, [0.0, 0.2]),
            result("lora", 1e-3, "dog", 1, [0.4, 0.6]),
            result("lora", 1e-3, "cat", 0, [0.9]),
            result("lora", 1e-3, "cat", 1, [0.7]),
        ]
    )
    (row,) = rows
    score = row["scores"]["dino"]
    assert score["mean"] == pytest.approx((0.3 + 0.8) / 2)
    by_seed = [(0.1 + 0.9) / 2, (0.5 + 0.7) / 2]
    assert score["spread"] == pytest.approx(np.std(by_seed, ddof=1))
    assert (row["subjects"], row["seeds"], row["images"], row["parameters"]) == (2, [0, 1], 6, 7)


def test_the_unit_is_the_subject_whose_seeds_are_averaged() -> None:
    values = {"dog": ([0.1, 0.3], [0.5]), "cat": ([0.9], [0.7]), "box": ([0.2], [0.4])}
    results = [result("lora", 1e-3, name, seed, found) for name, of in values.items() for seed, found in enumerate(of)]
    expected = stats.ttest_1samp([0.35, 0.8, 0.3], 0).confidence_interval(0.95)  # of the dog .2 and .5, not .1, .3, .5
    for order in itertools.permutations(results):
        score = summarize(list(order))[0]["scores"]["dino"]
        assert (score["low"], score["high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert scores_table(summarize(list(order))) == scores_table(summarize(results))


def test_one_subject_has_no_interval_and_the_caption_says_so() -> None:
    results = [result("lora", 1e-3, "dog", 0, [0.1, 0.3, 0.5])]
    score = summarize(results)[0]["scores"]["dino"]
    assert (score["mean"], score["low"], score["high"]) == (pytest.approx(0.3), None, None)
    text = summary_text(results, [], {"dino": {"model": "vit", "weights": "abc", "preprocessing": "x"}})
    assert "One subject, so there is no interval" in text
    assert "One seed of the training" in text
    assert "Judges: dino vit (abc)." in text


def test_the_best_method_is_held_against_the_others_by_subject() -> None:
    scores = {"ether": (0.5, 0.7, 0.61), "lora": (0.3, 0.4, 0.45), "oft": (0.1, 0.4, 0.2), "base": (0.9, 0.9, 0.9)}
    results = [
        result(arm, None if arm == "base" else 1e-3, subject, 0, [value])
        for arm, values in scores.items()
        for subject, value in zip("abc", values, strict=True)
    ]
    lora, oft = comparisons(results)  # the base is no rival
    assert (lora.arm, lora.rival, oft.rival) == ("ether", "lora", "oft")
    assert lora.difference.p == pytest.approx(stats.ttest_rel(scores["ether"], scores["lora"]).pvalue)
    text = summary_text(results, [], {})
    assert "| DINO of ether minus that of | difference, 95 % interval | p (Holm) | subjects |" in text
    assert f"| lora | +{lora.difference.mean:.3f} [" in text
    assert "biased upwards" in text
    several = [*results, result("lora", 1e-2, "a", 0, [0.2])]  # its best rate would be chosen from these results
    assert [each.rival for each in comparisons(several)] == ["oft"]


def scored(arm: str, rate: float | None, truth: float | None, dino: float, clip_t: float) -> dict[str, Any]:
    found = result(arm, rate, "dog", 0, [dino])
    found["images"][0] |= {"clip_t": clip_t} | ({} if truth is None else {"truth": truth})
    return found


def test_the_best_rate_keeps_three_quarters_of_the_bases_clip_t() -> None:
    """Where the truth is unknown: the highest DINO alone would be that of copies."""
    trained = [(1e-4, 0.3, 0.5), (1e-3, 0.5, 0.31), (1e-2, 0.9, 0.29)]
    rows = summarize([scored("base", None, None, 0.1, 0.4), *(scored("lora", r, None, d, c) for r, d, c in trained)])
    assert primary(rows).key == "dino"
    assert [row["learning_rate"] for row in best_rates(rows)] == [None, 1e-3]
    lost = summarize(
        [
            scored("base", None, None, 0.1, 0.4),
            scored("lora", 1e-3, None, 0.9, 0.1),
            scored("lora", 1e-4, None, 0.2, 0.2),
        ]
    )
    assert best_rates(lost)[1]["learning_rate"] == 1e-4  # none keeps enough: the one that keeps most


def test_the_best_rate_is_the_most_truthful_where_the_truth_is_known() -> None:
    trained = [(1e-4, 0.7, 0.3, 0.1), (1e-3, 0.6, 0.9, 0.5)]
    rows = summarize([scored("base", None, 0.5, 0.1, 0.4), *(scored("lora", *each) for each in trained)])
    assert primary(rows).key == "truth"
    assert [row["learning_rate"] for row in best_rates(rows)] == [None, 1e-4]


def test_pres_and_drift_are_scaled_between_the_base_and_copies() -> None:
    found = []
    for subject, (floor, ceiling) in {"dog": (0.1, 0.9), "cat": (0.3, 0.5)}.items():
        for arm, pres, drift in (("base", floor, 0.0), ("copies", ceiling, 0.4), ("lora", (floor + ceiling) / 2, 0.1)):
            more = {"class_images": [{"pres": pres}], "unrelated": [{"drift": drift}]}
            found.append(result(arm, None, subject, 0, [0.5]) | more)
    rows = {row["arm"]: row["scores"] for row in summarize(found)}
    for arm, pres, drift in (("base", 0, 0), ("copies", 1, 1), ("lora", 0.5, 0.25)):
        assert rows[arm]["pres_scaled"]["mean"] == pytest.approx(pres)
        assert rows[arm]["drift_scaled"]["mean"] == pytest.approx(drift)
    assert rows["lora"]["pres"]["mean"] == pytest.approx(0.45)  # the raw one stays in the files
    head = scores_table(summarize(found)).splitlines()[0]
    assert head.endswith("| PRES, scaled ↓ | drift, scaled ↓ |")
    alone = summarize([each for each in found if each["arm"] != "copies"])
    assert "pres_scaled" not in alone[0]["scores"]
    assert "| PRES ↓ | drift ↓ |" in scores_table(alone)


def test_a_subject_that_one_seed_lacks_is_not_in_the_spread() -> None:
    rows = [result("lora", None, "dog", seed, [value]) for seed, value in ((0, 0.2), (1, 0.4))]
    (row,) = summarize([*rows, result("lora", None, "cat", 0, [0.9])])
    assert row["scores"]["dino"]["spread"] == pytest.approx(np.std([0.2, 0.4], ddof=1))


def test_a_training_that_diverged_is_counted_and_never_the_best() -> None:
    lost = {**result("lora", 1e-1, "dog", 0, []), "diverged": "the loss is not finite"}
    rows = summarize([result("lora", 1e-3, "dog", 0, [0.3]), lost, result("lora", 1e-1, "cat", 0, [0.9])])
    assert [(row["diverged"], row["subjects"]) for row in rows] == [(0, 1), (1, 1)]
    assert [row["learning_rate"] for row in best_rates(rows)] == [1e-3]
    assert "| lora (1 diverged) | 0.1 |" in scores_table(rows)


def test_the_best_rate_of_every_arm() -> None:
    rows = summarize(
        [
            result("base", None, "dog", 0, [0.1]),
            result("lora", 1e-3, "dog", 0, [0.3]),
            result("lora", 1e-2, "dog", 0, [0.2]),
        ]
    )
    assert [(row["arm"], row["learning_rate"]) for row in best_rates(rows)] == [("base", None), ("lora", 1e-3)]
    table = scores_table(rows).splitlines()
    assert len(table) == 5
    assert table[3].startswith("| lora | 0.001 | 7 | 0.300 |")


def test_what_is_not_done_is_named(tmp_path: Path) -> None:
    dog = Subject("dog", "dog", tmp_path, ("a {token} dog",))
    jobs = [Job("base", {}, dog, 0), Job("lora", {"learning_rate": 1e-3}, dog, 0, 1e-3)]
    path = tmp_path / "results" / f"{jobs[0].key}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result("base", None, "dog", 0, [0.25, 0.5])))
    text, missing = write_summary(tmp_path, jobs)
    assert "Not in these tables (1): lora@0.001/dog/seed-0" in text
    assert missing == ["lora@0.001/dog/seed-0"]
    assert json.loads((tmp_path / "summary.json").read_text())["missing"] == ["lora@0.001/dog/seed-0"]
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [(line["subject"], line["dino"]) for line in lines] == [("dog", 0.25), ("dog", 0.5)]


def test_the_row_of_real_images_and_scores_of_other_kinds() -> None:
    dog, cat = (result("lora", 1e-3, subject, 0, [0.5]) for subject in ("dog", "cat"))
    dog |= {"real": {"dino": 0.8, "lpips": 0.6}, "class_images": [{"pres": 0.1}, {"pres": 0.3}]}
    cat |= {"real": {"dino": 0.6}, "unrelated": [{"drift": 0.25}], "prompts": [{"prompt": "p", "div": 0.4}]}
    real, row = summarize([dog, dict(dog), cat])
    assert real["arm"] == REAL
    assert real["scores"]["dino"]["mean"] == pytest.approx(0.7)
    assert set(real["scores"]) == {"dino"}  # LPIPS is not known of every subject
    means = {key: found["mean"] for key, found in row["scores"].items()}
    assert means == {
        **{"dino": 0.5, "clip_t": 0.25, "pres": pytest.approx(0.2)},
        **{"drift": 0.25, "div": 0.4},
    }
    text = scores_table([real, row])
    assert text.splitlines()[0].endswith("| DINO ↑ | CLIP-T ↑ | DIV ↑ | PRES ↓ | drift ↓ |")
    assert text.splitlines()[2].startswith(f"| {REAL} |  |  | 0.700 [")


def test_distances_are_means_over_the_jobs() -> None:
    jobs = [result("lora", 1e-3, subject, 0, [0.5]) for subject in ("dog", "cat")]
    for job, value in zip(jobs, (1.0, 3.0), strict=True):
        job["distances"] = {"weights": value, "transforms": None}
    assert summarize(jobs)[0]["distances"] == {"weights": 2.0}
