"""The small file of a benchmark's results says the same as the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.cli.programs.rows import table as main
from ether_diffusion.evaluation.subjects.compact import in_order, read_compact, write_compact
from ether_diffusion.evaluation.subjects.summary import at_strength, comparisons, strength_rows, summarize
from ether_diffusion.evaluation.tables import strengths_table
from ether_diffusion.reading import DamagedFileError


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
    write_compact(tmp_path / "results.json", results, {})
    known = read_compact(tmp_path / "results.json").results
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
    write_compact(tmp_path / "results.json", results, {})
    for known in (results, read_compact(tmp_path / "results.json").results):
        found = {(each.row["arm"], each.strength): each.on_front for each in strength_rows(known)}
        assert found == {
            **{("lora", 0.5): False, ("lora", 0.75): False, ("lora", 1): False},
            **{("ours", 0.5): True, ("ours", 0.75): False, ("ours", 1): True},
        }  # full at 1 is better than both in the middle; it has no strength, and no row
    assert [row["arm"] for row in summarize(at_strength(results, 0.5))] == ["ours", "lora"]
    assert "| ours | 0.001 | 0.5 | 0.400" in strengths_table(results)
    assert strength_rows([drawn_at("full", {"1": 0.55}, {"1": 0.46})]) == []


def test_every_picture_keeps_its_scores_and_prompt(tmp_path: Path) -> None:
    results = [result(arm, "dog", 0, 0.123456) for arm in ("base", "lora")]
    results[1] |= {"settings": {"pretrained_model_name_or_path": "/home/me/base", "method": "lora", "rank": 8}}
    results[1]["images"][1].pop("dino")
    for each in results:
        each["class_images"] = [{"prompt": "c", "pres": 0.5}]
        each["unrelated"] = [{"prompt": "u", "drift": 0.25}]
    settings = {"protocol": "my/subjects.yaml", "training": {"pretrained_model_name_or_path": "/home/me/base"}}
    write_compact(tmp_path / "rows.json", results, settings)
    known = read_compact(tmp_path / "rows.json")
    lora = known.results[1]
    assert lora["images"] == [
        {"prompt": "p", "truth": 0.12346, "dino": 0.06173},
        {"prompt": "p", "truth": 0.22346},
        {"prompt": "p", "truth": 0.32346, "dino": 0.06173},
    ]
    assert lora["class_images"] == [{"prompt": "c", "pres": 0.5}]
    assert lora["settings"] == {"method": "lora", "rank": 8}
    assert known.protocol is not None
    assert known.protocol["base"]["pretrained_model_name_or_path"] == "base"
    assert "/home" not in (tmp_path / "rows.json").read_text()  # nor anything else of this machine


def test_the_order_is_that_of_the_jobs_whoever_names_the_rate(tmp_path: Path) -> None:
    jobs = ["base/dog/seed-0", "shared/dog/seed-0", "own@0.01/dog/seed-0"]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    rates = {"other": 0.01, "own": 0.01, "shared": 0.01, "base": None}
    found = [{"arm": arm, "learning_rate": rate, "subject": "dog", "seed": 0} for arm, rate in rates.items()]
    assert [each["arm"] for each in in_order(found, tmp_path)] == ["base", "shared", "own", "other"]


def test_references_are_known_by_their_content(tmp_path: Path) -> None:
    def hashed() -> str | None:
        found = result("base", "dog", 0, 0.1) | {"references": [str(tmp_path / "0.png")]}
        found |= {"class_images": [], "unrelated": []}
        write_compact(tmp_path / "rows.json", [found], {"protocol": "playground", "training": {}})
        protocol = read_compact(tmp_path / "rows.json").protocol
        assert protocol is not None
        return protocol["subjects"]["dog"]["references"]

    assert hashed() is None  # they are gone
    (tmp_path / "0.png").write_bytes(b"one")
    first = hashed()
    (tmp_path / "0.png").write_bytes(b"two")
    assert None not in (first, hashed())
    assert first != hashed()


def test_twenty_methods_fit_into_two_megabytes(tmp_path: Path) -> None:
    """Eight subjects, two seeds, ten prompts, three strengths, all scores of the playground."""
    keys = ("truth", "dino", "dino_nearest", "clip_i", "clip_t", "clip_t_written")
    rows = [{"file": f"{n:04d}.png", "prompt": f"a prompt of some length {n}"} for n in range(10)]
    images = [row | dict.fromkeys(keys, 0.1234567 + n / 99) for n, row in enumerate(rows)]
    results = [
        result(f"method_{arm}", f"subject-{subject}", seed, 0.1)
        | {"images": images, "at": {"0.5": images, "0.75": images}, "class_images": [{"pres": 0.123456}] * 2}
        | {"unrelated": [{"drift": 0.123456}] * 7, "distances": {"weights": 1.23456789, "transforms": 2.3456789}}
        for arm in range(20)
        for subject in range(8)
        for seed in (0, 1)
    ]
    write_compact(tmp_path / "rows.json", results, {})
    assert (tmp_path / "rows.json").stat().st_size < 2e6


def test_the_program_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "rows.json")])
    assert "has no results: name the output_dir of a study" in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "dog.json").write_text(json.dumps(result("lora", "dog", 0, 0.2)))
    (tmp_path / "config.yaml").write_text("- no settings")
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "rows.json")])
    assert "config.yaml is damaged" in capsys.readouterr().err


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_compact(tmp_path / "rows.json", [result("lora", "dog", 0, 0.2)], {})
    whole = json.loads((tmp_path / "rows.json").read_text())
    for broken in ({"jobs": []}, whole | {"jobs": [{"arm": "lora", "scores": {"truth": "high"}}]}):
        (tmp_path / "rows.json").write_text(json.dumps(broken))
        with pytest.raises(DamagedFileError, match=r"rows\.json is damaged"):
            read_compact(tmp_path / "rows.json")
