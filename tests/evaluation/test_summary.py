"""The table against means and percentiles computed by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ether_diffusion.evaluation.jobs import Job
from ether_diffusion.evaluation.protocols import Subject
from ether_diffusion.evaluation.summary import REAL, best_rates, bootstrap, markdown, summarize, write_summary


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


def test_the_interval_is_that_of_all_resamples() -> None:
    """Of three values the 27 equally likely resamples can be listed."""
    values = [0.0, 1.0, 5.0]
    means = [sum(drawn) / 3 for drawn in itertools.product(values, repeat=3)]
    groups = [[value] for value in values]
    low, high = bootstrap(groups)
    assert low == pytest.approx(np.percentile(means, 2.5, method="inverted_cdf"), abs=1e-9)
    assert high == pytest.approx(np.percentile(means, 97.5, method="inverted_cdf"), abs=1e-9)
    assert bootstrap(groups) == (low, high)
    assert bootstrap([[value - 1, value + 1] for value in values]) == (low, high)  # the means of the groups
    for nothing in ([], [[0.5], []]):
        with pytest.raises(ValueError, match="no values"):
            bootstrap(nothing)


def test_the_interval_of_one_or_two_subjects_is_over_their_images() -> None:
    values = [0.0, 1.0, 5.0]
    means = [sum(drawn) / 3 for drawn in itertools.product(values, repeat=3)]
    low, high = bootstrap([values])
    assert low == pytest.approx(np.percentile(means, 2.5, method="inverted_cdf"), abs=1e-9)
    assert high == pytest.approx(np.percentile(means, 97.5, method="inverted_cdf"), abs=1e-9)
    lower, higher = bootstrap([values, [2.0, 2.0]])
    assert (lower, higher) == pytest.approx(((low + 2) / 2, (high + 2) / 2))


def test_a_subject_that_one_seed_lacks_is_not_in_the_spread() -> None:
    rows = [result("lora", None, "dog", seed, [value]) for seed, value in ((0, 0.2), (1, 0.4))]
    (row,) = summarize([*rows, result("lora", None, "cat", 0, [0.9])])
    assert row["scores"]["dino"]["spread"] == pytest.approx(np.std([0.2, 0.4], ddof=1))


def test_a_training_that_diverged_is_counted_and_never_the_best() -> None:
    lost = {**result("lora", 1e-1, "dog", 0, []), "diverged": "the loss is not finite"}
    rows = summarize([result("lora", 1e-3, "dog", 0, [0.3]), lost, result("lora", 1e-1, "cat", 0, [0.9])])
    assert [(row["diverged"], row["subjects"]) for row in rows] == [(0, 1), (1, 1)]
    assert [row["learning_rate"] for row in best_rates(rows)] == [1e-3]
    assert "| lora (1 diverged) | 0.1 |" in markdown(rows)


def test_the_best_rate_of_every_arm() -> None:
    rows = summarize(
        [
            result("base", None, "dog", 0, [0.1]),
            result("lora", 1e-3, "dog", 0, [0.3]),
            result("lora", 1e-2, "dog", 0, [0.2]),
        ]
    )
    assert [(row["arm"], row["learning_rate"]) for row in best_rates(rows)] == [("base", None), ("lora", 1e-3)]
    table = markdown(rows).splitlines()
    assert len(table) == 5
    assert table[3].startswith("| lora | 0.001 | 7 | 0.300 |")


def test_what_is_not_done_is_named(tmp_path: Path) -> None:
    dog = Subject("dog", "dog", tmp_path, ("a {token} dog",))
    jobs = [Job("base", {}, dog, 0), Job("lora", {"learning_rate": 1e-3}, dog, 0, 1e-3)]
    path = tmp_path / "results" / f"{jobs[0].key}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result("base", None, "dog", 0, [0.25, 0.5])))
    text, missing = write_summary(tmp_path, jobs)
    assert "Not in this table (1): lora@0.001/dog/seed-0" in text
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
    text = markdown([real, row])
    assert text.splitlines()[0].endswith("| DINO ↑ | CLIP-T ↑ | DIV ↑ | PRES ↓ | drift ↓ |")
    assert text.splitlines()[2].startswith(f"| {REAL} |  |  | 0.700 |  |")


def test_distances_are_means_over_the_jobs() -> None:
    jobs = [result("lora", 1e-3, subject, 0, [0.5]) for subject in ("dog", "cat")]
    for job, value in zip(jobs, (1.0, 3.0), strict=True):
        job["distances"] = {"weights": value, "transforms": None}
    assert summarize(jobs)[0]["distances"] == {"weights": 2.0}
