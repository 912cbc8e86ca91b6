"""The small file of a benchmark's results says the same as the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.evaluation.subjects.summary import (
    at_strength,
    comparisons,
    read_compact,
    strength_rows,
    summarize,
    write_compact,
)
from ether_diffusion.evaluation.tables import strengths_table


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


def drawn_at(arm: str, truth: dict[str, float], clip_t: dict[str, float]) -> dict[str, Any]:
    rows = {s: [{"file": "0.png", "truth": truth[s], "clip_t": clip_t[s]}] for s in truth}
    one = rows.pop("1")
    at = {"at": rows} if rows else {}
    return {"arm": arm, "subject": "dog", "seed": 0, "learning_rate": 1e-3, "judges": {}, "images": one} | at


def test_the_front_is_of_all_methods_at_all_strengths(tmp_path: Path) -> None:
    results = [
        drawn_at("ours", {"1": 0.6, "0.5": 0.4, "0.75": 0.5}, {"1": 0.3, "0.5": 0.5, "0.75": 0.45}),
        drawn_at("lora", {"1": 0.5, "0.5": 0.39, "0.75": 0.45}, {"1": 0.3, "0.5": 0.49, "0.75": 0.46}),
        drawn_at("full", {"1": 0.55}, {"1": 0.46}),
    ]
    write_compact(tmp_path / "results.json", results)
    for known in (results, read_compact(tmp_path / "results.json")):
        found = {(each.row["arm"], each.strength): each.on_front for each in strength_rows(known)}
        assert found == {
            **{("lora", 0.5): False, ("lora", 0.75): False, ("lora", 1): False},
            **{("ours", 0.5): True, ("ours", 0.75): False, ("ours", 1): True},
        }  # full at 1 is better than both in the middle; it has no strength, and no row
    assert [row["arm"] for row in summarize(at_strength(results, 0.5))] == ["ours", "lora"]
    assert "| ours | 0.001 | 0.5 | 0.400" in strengths_table(results)
    assert strength_rows([drawn_at("full", {"1": 0.55}, {"1": 0.46})]) == []
