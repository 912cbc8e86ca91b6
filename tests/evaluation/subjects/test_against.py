"""A benchmark beside committed rows: what may be compared, the comparison itself, and rows that run again."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import yaml
from scipy import stats

from ether_diffusion.cli.programs.rows import reproduce, table
from ether_diffusion.cli.programs.studies import bench
from ether_diffusion.evaluation.statistics import holm
from ether_diffusion.evaluation.subjects.against import (
    ANCHOR_TOLERANCE,
    TOLERANCE,
    budget_differences,
    check_named,
    check_same,
    compared_with,
    differences,
    job_of,
    read_rows,
    write_against,
)
from ether_diffusion.evaluation.subjects.benchmark import Bench
from ether_diffusion.evaluation.subjects.compact import Compact, Protocol, write_compact
from ether_diffusion.evaluation.subjects.reproduce import AGREES, DIFFERS, MOSTLY, Again, agreements, config_of
from ether_diffusion.evaluation.subjects.settings import BenchmarkConfig

if TYPE_CHECKING:
    from ether_diffusion.evaluation.runner import Job
    from ether_diffusion.evaluation.subjects.protocols import Subject
    from ether_diffusion.metrics.scoring import Judges

ROOT = Path(__file__).parents[3]
SUBJECTS = {"dog": (0.30, 0.42), "cat": (0.55, 0.50), "box": (0.41, 0.47)}
"""Of every subject a level of truth-likeness for each seed."""
SETTINGS: dict[str, Any] = {
    "protocol": "playground",
    "training": {"pretrained_model_name_or_path": "playground", "max_train_steps": 250, "train_batch_size": 4},
    **{"token": "qwe", "images_per_prompt": 1, "class_images": 0, "num_inference_steps": 25, "guidance_scale": 4.0},
    **{"instance_prompt": "a {token} {class}", "class_prompt": "a {class}", "drift": False},
}


def result(arm: str, subject: str, seed: int, level: float, rate: float | None = 1e-3) -> dict[str, Any]:
    """One job with three pictures, whose truth-likeness lies around a level."""
    anchor = arm in ("base", "copies")
    rows = [
        {"file": f"{n}.png", "prompt": f"p{n}", "truth": level + (n - 1) / 50, "clip_t": 0.4 + n / 7} for n in range(3)
    ]
    return {
        **{"arm": arm, "learning_rate": None if anchor else rate, "subject": subject, "seed": seed, "images": rows},
        **{"judges": {"dino": {"model": "playground", "weights": "d"}, "libraries": {"torch": "2.13.0"}}},
        **{"judged_by": {"dino": {"weights": "d"}, "truths": f"true {subject}", "scores": 2}},
        **{"base_hash": "b", "base_hashes": {"unet": "b", "text_encoder": "t"}, "git_revision": "abc"},
        **({} if anchor else {"settings": {**SETTINGS["training"], "method": "lora", "learning_rate": rate}}),
    }


def results(arms: dict[str, float]) -> list[dict[str, Any]]:
    """Every arm on all subjects and seeds; an arm's gain grows a little with the subject's level."""
    return [
        result(arm, subject, seed, level + gain * (1 + level))
        for arm, gain in arms.items()
        for subject, levels in SUBJECTS.items()
        for seed, level in enumerate(levels)
    ]


@pytest.fixture
def rows(tmp_path: Path) -> Compact:
    """The committed rows of two methods."""
    write_compact(tmp_path / "there.json", results({"base": 0.0, "lora": 0.2, "oft": 0.1}), SETTINGS)
    return read_rows(tmp_path / "there.json")


def protocol(rows: Compact) -> Protocol:
    assert rows.protocol is not None
    return copy.deepcopy(rows.protocol)


def test_methods_are_compared_with_committed_ones_by_subject(rows: Compact, tmp_path: Path) -> None:
    own = results({"base": 0.0, "mine": 0.3})
    lora, oft = compared_with(own, rows)
    assert [(each.arm, each.rival) for each in (lora, oft)] == [("mine", "lora [there]"), ("mine", "oft [there]")]
    means = {subject: sum(levels) / 2 for subject, levels in SUBJECTS.items()}
    expected = [stats.ttest_1samp([gain * (1 + m) for m in means.values()], 0) for gain in (0.1, 0.2)]
    for found, test, corrected in zip((lora, oft), expected, holm([t.pvalue for t in expected]), strict=True):
        interval = test.confidence_interval(0.95)
        assert found.difference.units == 3
        assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high), abs=1e-4)
        assert found.p_holm == pytest.approx(corrected, rel=0.02)  # scores have five digits in the file
    text = write_against(tmp_path, own, rows)
    assert f"| mine | lora [there] | +{lora.difference.mean:.3f} [" in text
    assert "| lora [there] | 0.001 |" in text
    assert "Comparisons that p is corrected for: 2." in text
    assert (tmp_path / "against.md").read_text() == text
    known = json.loads((tmp_path / "against.json").read_text())
    assert known["comparisons"][0]["difference"]["mean"] == pytest.approx(lora.difference.mean)
    assert known["anchors"] == [{"arm": "base", "largest": pytest.approx(0, abs=1e-5)}]


def test_only_jobs_that_both_have_are_compared(rows: Compact) -> None:
    own = [each for each in results({"mine": 0.3}) if (each["subject"], each["seed"]) != ("dog", 1)]
    own = [each for each in own if each["subject"] != "box"]
    lora, _ = compared_with(own, rows)
    levels = [SUBJECTS["dog"][0], sum(SUBJECTS["cat"]) / 2]  # of the dog seed 0 alone, of both
    assert lora.difference.units == 2
    assert lora.difference.mean == pytest.approx(sum(0.1 * (1 + level) for level in levels) / 2, abs=1e-4)


def test_an_arm_with_several_rates_is_not_compared_and_the_text_says_so(rows: Compact, tmp_path: Path) -> None:
    own = [*results({"base": 0.0, "mine": 0.3}), result("mine", "dog", 0, 0.9, rate=1e-2)]
    assert compared_with(own, rows) == []
    assert "chosen from these results: mine" in write_against(tmp_path, own, rows)


def test_without_the_same_anchors_nothing_is_compared(rows: Compact, tmp_path: Path) -> None:
    text = write_against(tmp_path, results({"base": 2 * ANCHOR_TOLERANCE, "mine": 0.3}), rows)
    assert "NOT COMPARED: base should be equal" in text
    assert json.loads((tmp_path / "against.json").read_text())["comparisons"] == []
    near = write_against(tmp_path, results({"base": ANCHOR_TOLERANCE / 4, "mine": 0.3}), rows)
    assert "NOT COMPARED" not in near


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("lara [there]", r"names 'lara \[there\]', of no method of the file: lora \[there\], oft \[there\]"),
        ("base [there]", "of no method of the file"),
        ("lora [there]@1e-2", r"names 'lora \[there\]@1e-2', and the file has it at 0\.001"),
    ],
)
def test_a_comparison_with_what_the_file_does_not_have_is_refused(rows: Compact, cell: str, told: str) -> None:
    check_named(rows, {"a": [["mine"], ["lora [there]", "oft [there]@1e-3"]]}, SUBJECTS, [0, 1])
    with pytest.raises(ValueError, match=told):
        check_named(rows, {"a": [["mine"], [cell]]}, SUBJECTS, [0, 1])


def test_a_comparison_needs_all_jobs_of_the_files_arm(rows: Compact) -> None:
    rows.results[:] = [r for r in rows.results if (r["arm"], *job_of(r)) != ("lora", "cat", 1)]
    sides = {"a": [["mine"], ["lora [there]"]]}
    check_named(rows, sides, SUBJECTS, [0])
    with pytest.raises(ValueError, match="of which the file lacks cat with seed 1"):
        check_named(rows, sides, SUBJECTS, [0, 1])


def test_arms_are_not_called_as_those_of_the_file(tmp_path: Path) -> None:
    training = {"pretrained_model_name_or_path": "playground"}
    with pytest.raises(ValueError, match=r"an arm cannot be called lora \[there\]"):
        BenchmarkConfig(tmp_path, arms={"lora [there]": {}}, training=training, against=tmp_path / "there.json")
    BenchmarkConfig(tmp_path, arms={"lora [there]": {}}, training=training, against=tmp_path / "other.json")


@pytest.mark.parametrize("where", ["base", "mine"])
def test_planned_comparisons_with_the_file_need_its_anchors(where: str, rows: Compact, tmp_path: Path) -> None:
    """An arm of its own may still be compared with another."""
    planned = {"a": [["mine"], ["lora [there]" if where == "base" else "other"]]}
    training = {"pretrained_model_name_or_path": "playground"}
    config = BenchmarkConfig(
        tmp_path / "study", arms={"mine": {}, "other": {}}, training=training, against=tmp_path / "there.json"
    )
    config.planned, config.guidance_scale = planned, 4.0
    own = results({"base": 2 * ANCHOR_TOLERANCE, "mine": 0.3, "other": 0.1})
    for each in own:
        path = config.output_dir / "results" / f"{each['arm']}-{each['subject']}-{each['seed']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(each))
    (config.output_dir / "planned.md").write_text("of another time")
    study = Bench(config, [], cast("Judges", None), torch.device("cpu"), rows)
    jobs = [SimpleNamespace(key=path.stem) for path in sorted((config.output_dir / "results").iterdir())]
    text, missing = study.summarize(cast("list[Job[Subject]]", jobs))
    assert missing == []
    assert "NOT COMPARED: base" in text
    told = "The planned comparisons are not made: base is not that of there.json." in text
    assert told == (where == "base")
    written = config.output_dir / "planned.md"
    assert written.exists() != told
    assert told or "| a | +" in written.read_text()


def test_other_versions_are_named(rows: Compact, tmp_path: Path) -> None:
    own = results({"mine": 0.3})
    own[0]["judges"] = {"libraries": {"torch": "2.14.0"}}
    assert "torch 2.13.0 → 2.14.0" in write_against(tmp_path, own, rows)


Change = Callable[[Any], object]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: p["asked"].update(guidance_scale=3.0), "guidance_scale is 3.0, there 4.0"),
        (lambda p: p["asked"].update(instance_prompt="a {class}"), "instance_prompt is 'a {class}', there"),
        (lambda p: p["training"].update(prompt_chunks=2), "another encoding of prompts: prompt_chunks is 2"),
        (lambda p: p["training"].update(max_sequence_length=96), "another encoding of prompts: max_sequence"),
        (lambda p: p["base_hashes"].update(text_encoder="u"), "another base: text_encoder t → u"),
        (lambda p: p["judged_by"]["dino"].update(weights="e"), "another judge dino"),
        (lambda p: p["judged_by"].update(scores=3), "the scores are of another version"),
        (lambda p: p["subjects"]["dog"].update(truths="others"), "another world: other true pictures of dog"),
        (lambda p: p["subjects"]["dog"].update(references="x"), "another world: other reference pictures of dog"),
        (lambda p: p["subjects"]["cat"]["prompts"].update(images=["q"]), "other prompts for cat"),
        (lambda p: p["subjects"].update(hen=p["subjects"]["dog"]), "it has no subject hen; it has dog, cat, box"),
    ],
)
def test_what_differs_is_refused_by_name(change: Change, named: str, rows: Compact) -> None:
    theirs = protocol(rows)
    theirs["subjects"]["dog"]["references"] = "r"
    ours = copy.deepcopy(theirs)
    assert differences(theirs, ours) == []
    change(ours)
    (found,) = differences(theirs, ours)
    assert found.startswith(named)
    known = Compact("there", rows.results, theirs, rows.judges)
    with pytest.raises(ValueError, match=r"there\.json is of other jobs.*leave --against out"):
        check_same(known, ours, {}, [0])


def test_pictures_that_nobody_has_any_more_contradict_nothing(rows: Compact) -> None:
    ours = protocol(rows)
    assert ours["subjects"]["dog"]["references"] is None  # there are no such files
    ours["subjects"]["dog"]["references"] = "x"
    assert differences(protocol(rows), ours) == []


def test_another_budget_or_seed_is_refused(rows: Compact) -> None:
    assert budget_differences(protocol(rows), {"mine": SETTINGS["training"]}) == []
    longer = SETTINGS["training"] | {"max_train_steps": 500}
    assert budget_differences(protocol(rows), {"mine": longer}) == [
        "another budget: max_train_steps of mine is 500, there 250"
    ]
    without = {"max_train_steps": 250}  # the default is 1
    assert budget_differences(protocol(rows), {"mine": without}) == [
        "another budget: train_batch_size of mine is 1, there 4"
    ]
    with pytest.raises(ValueError, match="it has no seed 7; it has 0, 1"):
        check_same(rows, protocol(rows), {}, [0, 7])


def test_what_runs_again_encodes_prompts_as_the_file_says(tmp_path: Path) -> None:
    training = {**SETTINGS["training"], "prompt_chunks": 2}
    own = results({"base": 0.0, "lora": 0.2})
    for each in own:
        if "settings" in each:
            each["settings"]["prompt_chunks"] = 2
    write_compact(tmp_path / "chunks.json", own, SETTINGS | {"training": training})
    again = Again(tmp_path / "again", arms=["lora"], clip="playground")
    config = config_of(read_rows(tmp_path / "chunks.json"), again)
    assert config.encoding.prompt_chunks == 2
    assert config.settings_of("lora")["prompt_chunks"] == 2


def test_a_file_of_means_is_no_file_to_compare_with() -> None:
    with pytest.raises(ValueError, match=r"does not say what its jobs share.*ether study table"):
        read_rows(ROOT / "docs" / "results" / "rates.json")


def test_a_row_agrees_within_the_tolerance_of_every_picture(rows: Compact) -> None:
    same = results({"base": 0.0, "lora": 0.2})
    assert [row.verdict for row in agreements(same, rows)] == [AGREES, AGREES]
    for each in same:
        if each["arm"] == "lora" and each["seed"] == 1:  # three of six trainings took another course
            each["images"][2]["clip_t"] += 2 * TOLERANCE
    base, lora = agreements(same, rows)
    assert (base.verdict, lora.verdict) == (AGREES, MOSTLY)
    assert [(job.within, job.pictures) for job in lora.jobs] == [(3, 3), (2, 3)] * 3
    for each in same:
        if each["subject"] == "dog":
            each["images"][0]["truth"] += 2 * (ANCHOR_TOLERANCE if each["arm"] == "base" else TOLERANCE)
    base, lora = agreements(same, rows)
    assert (base.verdict, lora.verdict) == (DIFFERS, DIFFERS)  # of anchors all must agree, of trainings half


def test_a_training_that_diverged_agrees_with_one_that_did_so_too(rows: Compact) -> None:
    own = results({"lora": 0.2})
    own[0] |= {"diverged": "the loss is not finite", "images": []}
    assert [job.agrees for job in agreements(own, rows)[0].jobs] == [False, *[True] * 5]
    rows.results[[r["arm"] for r in rows.results].index("lora")] |= {"diverged": "likewise", "images": []}
    assert agreements(own, rows)[0].verdict == AGREES


def test_a_benchmark_beside_another_and_a_row_that_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((ROOT / "configs" / "eval_playground.yaml").read_text())
    config["training"]["max_train_steps"], config["class_images"] = 2, 0
    config |= {"seeds": [0], "subjects": ["gift-box"], "num_inference_steps": 2, "drift": False}
    arms = {"lora": {"method": "lora", "learning_rate": 1e-3}, "mine": {"method": "ether_plus", "learning_rate": 1e-2}}
    planned = {"mine": {"mine minus lora": [["mine"], ["lora [rows]"]]}}
    for arm, settings in arms.items():
        own = {"arms": {arm: settings}, "planned": planned.get(arm, {})}
        (tmp_path / f"{arm}.yaml").write_text(yaml.safe_dump(config | own))

    def arguments(arm: str, *more: str) -> list[str]:
        return ["--config", str(tmp_path / f"{arm}.yaml"), "--output_dir", str(tmp_path / arm), *more]

    bench(arguments("lora"))
    table([str(tmp_path / "lora"), str(tmp_path / "rows.json")])
    assert (tmp_path / "rows.json").read_text() == (tmp_path / "lora" / "results.json").read_text()
    said = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.strip()]
    assert [line for line in said if "job" not in line] == []  # of what each job does nothing: one bar for all

    with pytest.raises(SystemExit, match=r"names 'lora \[rows\]', of no arm: mine"):
        bench(arguments("mine"))
    bench(arguments("mine", "--against", str(tmp_path / "rows.json")))
    shown = capsys.readouterr().out
    (found,) = json.loads((tmp_path / "mine" / "planned.json").read_text())["planned"]
    compared = json.loads((tmp_path / "mine" / "against.json").read_text())["comparisons"]
    assert found["difference"]["mean"] == pytest.approx(compared[0]["difference"]["mean"])
    assert "| mine | lora [rows] |" in shown
    anchors = json.loads((tmp_path / "mine" / "against.json").read_text())["anchors"]
    assert [each["arm"] for each in anchors] == ["base", "truth", "copies", "noise"]
    assert max(each["largest"] for each in anchors) < 1e-5  # the file has five digits
    assert not (tmp_path / "mine" / "results" / "lora@0.001").exists()
    with pytest.raises(SystemExit, match=r"guidance_scale is 3\.0, there 4\.0"):
        bench(arguments("mine", "--against", str(tmp_path / "rows.json"), "--guidance_scale", "3"))

    again = ["--output_dir", str(tmp_path / "again"), "--arms", "lora"]
    reproduce([str(tmp_path / "rows.json"), *again])
    assert "| lora@0.001 | 1 of 1 | 10 of 10 |" in capsys.readouterr().out
    content = json.loads((tmp_path / "rows.json").read_text())
    next(job for job in content["jobs"] if job["arm"] == "lora")["scores"]["truth"][3] += 2 * TOLERANCE
    (tmp_path / "rows.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        reproduce([str(tmp_path / "rows.json"), *again])
    assert ended.value.code == 1
    assert "lora@0.001, gift-box, seed 0: 9 of 10 pictures agree" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reproduce([str(tmp_path / "rows.json"), "--output_dir", str(tmp_path / "again"), "--arms", "lara"])
    assert 'has no arm lara, did you mean "lora"?; it has lora' in capsys.readouterr().err
