"""The small file of a benchmark's results says the same as the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.evaluation.subjects.summary import comparisons, read_compact, summarize, write_compact


def result(arm: str, subject: str, seed: int, value: float) -> dict[str, Any]:
    images = [{"file": f"{n}.png", "prompt": "p", "truth": value + n / 10, "dino": value / 2} for n in range(3)]
    trained = {} if arm in ("base", "copies") else {"trained_parameters": {"unet": 7}, "learning_rate": 1e-3}
    return {
        **{"arm": arm, "subject": subject, "seed": seed, "learning_rate": None, "judges": {"dino": {"model": "vit"}}},
        **{"images": images, "class_images": [{"pres": value}, {"pres": value + 0.2}], "unrelated": [{"drift": value}]},
        **{"prompts": [], "real": {"dino": 0.9}, "references": ["x"], "git_revision": "abc"},
        **trained,
    }


def test_rows_and_comparisons_are_those_of_the_whole_results(tmp_path: Path) -> None:
    levels = {"base": 0.1, "copies": 0.8, "ether": 0.45, "lora": 0.41}
    results = [
        result(arm, subject, seed, level + 0.03 * place + 0.011 * seed * (place - 1) + 0.01 * len(arm) * place)
        for arm, level in levels.items()
        for place, subject in enumerate(("dog", "cat", "box"))
        for seed in (0, 1)
    ]
    results.append(
        {**result("lora", "box", 2, 0.0), "diverged": "NaN", "images": [], "class_images": [], "unrelated": []}
    )
    write_compact(tmp_path / "results.json", results)
    known = read_compact(tmp_path / "results.json")
    whole, small = summarize(results), summarize(known)
    assert [row["arm"] for row in small] == [row["arm"] for row in whole]
    for mine, theirs in zip(small, whole, strict=True):
        for name in ("learning_rate", "subjects", "seeds", "diverged", "parameters"):
            assert mine[name] == theirs[name]
        for key, found in theirs["scores"].items():
            for part, value in found.items():
                assert mine["scores"][key][part] == pytest.approx(value, abs=1e-4)
    for mine, theirs in zip(comparisons(known), comparisons(results), strict=True):
        assert (mine.arm, mine.rival) == (theirs.arm, theirs.rival)
        assert mine.difference.mean == pytest.approx(theirs.difference.mean, abs=1e-4)
    assert (tmp_path / "results.json").stat().st_size < 400 * len(results)
    assert known[0]["judges"] == {"dino": {"model": "vit"}}
