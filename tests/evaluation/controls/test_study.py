"""A study of controls: its jobs, that stops change nothing, what it finds again, and its tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from ether_diffusion.cli.programs.control_accuracy import main as accuracy
from ether_diffusion.cli.programs.rows import table
from ether_diffusion.cli.programs.studies import controls as controls_main
from ether_diffusion.evaluation.controls import pages as control_pages
from ether_diffusion.evaluation.controls import study as control_study
from ether_diffusion.evaluation.controls.compact import read_rows
from ether_diffusion.evaluation.controls.findings import differences, read_differences, read_findings, write_outline
from ether_diffusion.evaluation.controls.pages import read_section, write_compared, write_study
from ether_diffusion.evaluation.controls.settings import ControlStudyConfig
from ether_diffusion.evaluation.controls.study import ControlStudy, all_jobs, training_of
from ether_diffusion.evaluation.overview import write_report
from ether_diffusion.evaluation.tables import (
    ONE_SEED,
    control_rates_table,
    controls_table,
    differences_table,
    steps_caption,
)
from ether_diffusion.metrics.segmentation import Segmenter
from ether_diffusion.playground.pairs import draw_pair, write_pairs
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.private import forget_accelerator
from ether_diffusion.runs.control_drawing import Drawing
from ether_diffusion.runs.drawing import draw_samples, load_run
from ether_diffusion.runs.record import read_run
from ether_diffusion.training import control
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.control_config import ControlConfig

TRAINING: dict[str, Any] = {
    "pretrained_model_name_or_path": "playground",
    "train_data_dir": "playground",
    "num_validation_images": 0,
}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerator()


def study_of(folder: Path, **changes: Any) -> ControlStudyConfig:
    values: dict[str, Any] = {
        "output_dir": folder,
        "training": TRAINING,
        "arms": {"ETHER": {"method": "ether", "learning_rate": [1e-2, 1e-3]}, "encoder alone": {"method": "none"}},
        "eval_steps": [1, 2],
        "pairs": 2,
        "curve_pairs": 1,
        "samples": 2,
        "num_inference_steps": 2,
        "keep_runs": True,
    }
    return ControlStudyConfig(**values | changes)


def run(config: ControlStudyConfig) -> ControlStudy:
    study, jobs = ControlStudy(config, torch.device("cpu")), all_jobs(config)
    write_outline(config.output_dir, [job.key for job in jobs], config.eval_steps[-1], config.data)
    for job in jobs:
        study.run_job(job)
    return study


def test_jobs_are_every_rate_of_every_arm_by_turns(tmp_path: Path) -> None:
    jobs = all_jobs(study_of(tmp_path))
    assert [(job.key, job.settings.get("learning_rate")) for job in jobs] == [
        ("ETHER@0.01/seed-0", 1e-2),
        ("encoder alone/seed-0", None),
        ("ETHER@0.001/seed-0", 1e-3),
    ]
    arms = {"a": {"learning_rate": [1, 2]}, "b": {}}
    seeded = all_jobs(study_of(tmp_path, arms=arms, seeds=[3, 4, 3]))
    assert [job.key for job in seeded] == [
        "a@1/seed-3",
        "b/seed-3",
        "a@2/seed-3",
        "b/seed-4",
        "a@1/seed-4",
        "a@2/seed-4",
    ]
    assert [training_of(job, tmp_path, 1).seed for job in seeded] == [3, 3, 3, 4, 4, 4]
    assert all_jobs(study_of(tmp_path, arms={"a": {"learning_rate": ["3e-3"]}}))[0].rate == 3e-3
    one = all_jobs(study_of(tmp_path, arms={"a": {"encoder_lr": "3e-3", "learning_rate": 1}, "b": {"encoder_lr": 2}}))
    assert [(job.key, job.rate) for job in one] == [("a@1/seed-0", 1.0), ("b@2/seed-0", 2.0)]
    assert one[0].settings["encoder_lr"] == 3e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "arms is empty"),
        ({"eval_steps": []}, "eval_steps must be"),
        ({"seeds": []}, "seeds is empty"),
        ({"arms": {"a": {"learning_rate": []}}}, "arm a: learning_rate is an empty list"),
        ({"training": {**TRAINING, "seed": 3}}, "training: name the seeds of the trainings in seeds"),
        ({"compare_with": ["LoRA"]}, "compare_with: there is no arm 'LoRA'; there are: ETHER, encoder alone"),
        ({"training": {"train_data_dir": "x"}}, "data is missing"),
        ({"arms": {"a": {"resume": "latest"}}}, "a: resume is set by the study itself"),
        ({"arms": {"a": {"learning_rate": [1, 2], "encoder_lr": [1, 2]}}}, "only one of learning_rate, encoder_lr"),
        ({"arms": {"a": {"learning_rate": ["fast"]}}}, "arm a: a learning rate is no number"),
        ({"arms": {"a": {"metod": "ether"}}}, "arm a: .*metod"),
        ({"arms": {"a": {"lr_scheduler": "cosine"}}}, "arm a: lr_scheduler=cosine depends on the training's length"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_impossible_settings(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    def prepare() -> None:
        config = study_of(tmp_path, **changes)
        for job in all_jobs(config):
            training_of(job, tmp_path, 2)

    with pytest.raises(ValueError, match=message):
        prepare()


def test_stops_change_nothing_and_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = run(study_of(tmp_path / "study", fid_features="playground", clip="playground"))
    job = study.config.output_dir / "runs" / "ETHER@0.01" / "seed-0"
    settings = {"method": "ether", "learning_rate": 1e-2, "output_dir": tmp_path / "whole", "max_train_steps": 2}
    forget_accelerator()
    control.run(ControlConfig(**TRAINING | settings))
    stopped, whole = (load_file(folder / "ether_weights.safetensors") for folder in (job, tmp_path / "whole"))
    assert stopped.keys() == whole.keys()
    assert all(torch.equal(stopped[key], whole[key]) for key in whole)

    last = json.loads((tmp_path / "study" / "results" / "ETHER@0.01" / "seed-0" / "000002.json").read_text())
    assert (last["pairs"], last["samples_per_pair"], last["steps"]) == (2, 2, 2)
    assert {"miou", "macc", "aacc", "clip_t"} == set(last["scores"])
    too_few = "KID is left out: it needs 256 images of each kind, there are 1 real and 2 generated images."
    assert too_few in last["warnings"]
    assert set(last["trained_parameters"]) == {"unet", "control_encoder"}
    first = json.loads((tmp_path / "study" / "results" / "ETHER@0.01" / "seed-0" / "000001.json").read_text())
    assert (first["pairs"], first["samples_per_pair"], set(first["scores"])) == (1, 1, {"miou", "macc", "aacc"})

    def no_more(config: ControlConfig) -> Path:
        raise AssertionError(f"{config.output_dir} is trained again")

    monkeypatch.setattr(control, "run", no_more)
    run(study.config)
    with pytest.raises(ValueError, match="made with other settings: remove it, or choose another output_dir"):
        run(study_of(tmp_path / "study", samples=3))

    text = write_study(tmp_path / "study")
    assert text.count("\n| ETHER | 0.01 |") + text.count("\n| ETHER | 0.001 |") == 1
    assert "| encoder alone |  | 0 | 99,760 |" in text
    assert too_few in text.splitlines()
    assert too_few in (tmp_path / "study" / "table.md").read_text()
    assert f'<p class="note">{too_few}</p>' in write_report([tmp_path / "study"], tmp_path / "page.html").read_text()
    with Image.open(tmp_path / "study" / "samples.png") as sheet:
        assert sheet.height > 4 * 96
    assert (tmp_path / "study" / "steps.png").is_file()

    best = read_findings(tmp_path / "study").best
    row = best["ETHER"].last[0]
    difference = row["scores"]["miou"]["mean"] - best["encoder alone"].last[0]["scores"]["miou"]["mean"]
    text = write_compared(tmp_path / "study", ["encoder alone", "not done"])
    assert f"| ETHER | encoder alone | {difference:+.3f} |  | 1 |" in text
    assert ONE_SEED in text


def test_the_program_tells_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"ETHER": {"method": "ether"}, "encoder alone": {"method": "none"}}
    settings = {"training": TRAINING, "arms": arms, "eval_steps": [1], "pairs": 2, "samples": 1}
    recipe = tmp_path / "study.yaml"
    recipe.write_text(json.dumps(settings | {"num_inference_steps": 2, "compare_with": ["encoder alone"]}))
    flags = ["--config", str(recipe), "--output_dir", str(tmp_path / "study")]
    controls_main(flags)
    assert "| method | minus | difference in mIoU, 95 % interval | p (Holm) | seeds |" in capsys.readouterr().out
    outline = (tmp_path / "study" / "study.json").read_text()
    with pytest.raises(SystemExit, match="made with other settings"):
        controls_main([*flags, "--eval_steps=[1, 2]"])
    assert (tmp_path / "study" / "study.json").read_text() == outline


def test_results_from_another_base_or_by_other_judges_are_refused_by_name(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    training = {**TRAINING, "pretrained_model_name_or_path": str(tmp_path / "base"), "resolution": 64}
    config = study_of(tmp_path / "study", training=training, arms={"a": {"method": "none"}}, eval_steps=[1])
    run(config)
    path = tmp_path / "study" / "results" / "a" / "seed-0" / "000001.json"
    old = json.loads(path.read_text())
    run(config)
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=f"another base .unet {old['base_hash']['unet']} → ") as told:
        run(config)
    assert f"another base (text_encoder {old['base_hash']['text_encoder']} → " in str(told.value)
    path.write_text(json.dumps({key: value for key, value in old.items() if key not in ("base_hash", "judges")}))
    run(config)  # as an older version wrote it: nothing contradicts
    path.write_text(json.dumps(old | {"base_hash": {}}))
    known = old["judges"]["segmenter"]["weights"]
    original = Segmenter.__init__

    def changed(segmenter: Segmenter, *arguments: Any) -> None:
        original(segmenter, *arguments)
        segmenter.identity = {**segmenter.identity, "weights": "0123"}

    monkeypatch.setattr(Segmenter, "__init__", changed)
    with pytest.raises(ValueError, match=f"was made with another judge .segmenter {known} → 0123"):
        run(config)


def test_independent_shards_give_the_results_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"ETHER": {"method": "ether", "learning_rate": [1e-2, 1e-3]}, "encoder alone": {"method": "none"}}
    settings = {"training": TRAINING, "arms": arms, "eval_steps": [1], "pairs": 2, "samples": 1}
    recipe = tmp_path / "study.yaml"
    recipe.write_text(json.dumps(settings | {"num_inference_steps": 2, "compare_with": ["encoder alone"]}))
    controls_main(["--config", str(recipe), "--output_dir", str(tmp_path / "one")])
    for shard in ("2/2", "1/2"):
        controls_main(["--config", str(recipe), "--output_dir", str(tmp_path / "split"), "--shard", shard])

    def results(folder: Path) -> dict[str, Any]:
        found = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        assert len(list(folder.glob("results/*/*/*.json"))) == 3
        return found

    one, split = results(tmp_path / "one"), results(tmp_path / "split")
    assert split.keys() == one.keys()
    assert [name for name in one if one[name] != split[name]] == []
    with pytest.raises(SystemExit, match="shard is '3/2'"):
        controls_main(["--config", str(recipe), "--output_dir", str(tmp_path / "split"), "--shard", "3/2"])


def test_a_diverged_arm_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(config: ControlConfig) -> Path:
        raise control_study.TrainingDivergedError("the loss is not finite at step 1\nmore")

    monkeypatch.setattr(control, "run", diverge)
    config = study_of(tmp_path, arms={"a": {"method": "none"}})
    run(config)
    assert "a/seed-0 (diverged, the loss is not finite at step 1" in write_study(tmp_path)

    def again(config: ControlConfig) -> Path:
        raise AssertionError("a training that diverged is done again")

    monkeypatch.setattr(control, "run", again)
    run(config)


def test_pictures_drawn_with_other_settings_are_not_scored(tmp_path: Path) -> None:
    arms = {"a": {"method": "none"}}
    run(study_of(tmp_path, arms=arms, eval_steps=[1]))
    folder = tmp_path / "images" / "a" / "seed-0" / "000001"
    before = (folder / "00000-0.png").read_bytes()
    (tmp_path / "results" / "a" / "seed-0" / "000001.json").unlink()
    run(study_of(tmp_path, arms=arms, eval_steps=[1], guidance_scale=2.0))
    assert (folder / "00000-0.png").read_bytes() != before


def result(arm: str, rate: float | None, miou: float, steps: int = 2, seed: int = 0) -> dict[str, Any]:
    scores = {"miou": {"mean": miou, "spread": None}, "fid": {"mean": 12.345, "spread": 1.0}}
    counts = {"unet": 1000, "control_encoder": 10}
    facts = {"arm": arm, "rate": rate, "seed": seed, "steps": steps, "trained_parameters": counts, "originals": {}}
    facts |= {"pairs": 2, "samples_per_pair": 1, "folder": "images", "classes": [], "judges": {}, "choices": {}}
    facts |= {"warnings": []}
    return facts | {"scores": scores}


def write_results(folder: Path, rows: list[dict[str, Any]], more: Sequence[str] = ()) -> None:
    keys = [f"{row['arm']}@{row['rate']}/seed-{row['seed']}" for row in rows]
    write_outline(folder, [*dict.fromkeys(keys), *more], 2, None)
    for key, row in zip(keys, rows, strict=True):
        place = folder / "results" / key / f"{row['steps']:06d}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(row))


def test_the_table_has_every_arm_at_its_best_rate_by_ascending_miou(tmp_path: Path) -> None:
    rows = [result("a", 1, 0.1, 1), result("a", 1, 0.5), result("a", 2, 0.6), result("b", 1, 0.55)]
    write_results(tmp_path, [*rows, result("c", 1, 0.9, 1)], ["d/seed-0"])
    findings = read_findings(tmp_path)
    assert controls_table(findings.best).splitlines()[2:4] == [
        "| b | 1 | 1,000 | 10 | 0.550 | 12.35 ± 1.00 |",
        "| a | 2 | 1,000 | 10 | 0.600 | 12.35 ± 1.00 |",
    ]
    assert "± is the standard deviation over the sample numbers" in controls_table(findings.best)
    assert control_rates_table(findings).splitlines()[2:3] == ["| a | 0.500 (1) | 0.600 (2) |"]
    assert findings.left_out == ["c@1/seed-0 (at step 1 of 2)", "d/seed-0 (not done yet)"]


def test_no_table_before_the_last_step(tmp_path: Path) -> None:
    write_results(tmp_path, [result("a", 1, 0.1, 1)])
    assert "nothing can be compared yet\n\nNot in the tables: a@1/seed-0 (at step 1 of 2)" in write_study(tmp_path)


def test_seeds_are_averaged_and_a_rate_at_which_one_diverged_is_left_out(tmp_path: Path) -> None:
    rows = [result("a", 1, 0.5), result("a", 1, 0.6, seed=1), result("a", 2, 0.4), result("a", 2, 0.65, seed=1)]
    diverged = result("a", 3, 0.9, 1, seed=1) | {"diverged": "not finite at step 7"}
    del diverged["scores"]
    write_results(tmp_path, [*rows, result("a", 3, 0.9), diverged])
    findings = read_findings(tmp_path)
    assert controls_table(findings.best).splitlines() == [
        "| method | rate | adapter | control | mIoU | FID |",
        "|---|---:|---:|---:|---:|---:|",
        "| a | 1 | 1,000 | 10 | 0.550 ± 0.071 | 12.35 ± 0.00 |",
        "",
        "Means over 2 seeds of the training; ± is their standard deviation.",
    ]
    assert control_rates_table(findings).splitlines()[2] == "| a | 0.550 (1) | 0.525 (2) | diverged (3) |  |"
    assert findings.left_out == [
        "a@3/seed-0 (another seed diverged)",
        "a@3/seed-1 (diverged, not finite at step 7, so that its rate is left out)",
    ]


def test_only_seeds_that_all_have_are_compared(tmp_path: Path) -> None:
    """Or a rate would be the best of its arm, or an arm ahead of another, by a lucky seed."""
    rows = [result("a", 1, 0.5), result("a", 1, 0.7, seed=1), result("a", 2, 0.55), result("b", 1, 0.52)]
    write_results(tmp_path, [*rows, result("b", 1, 0.9, 1, seed=1)])
    findings = read_findings(tmp_path)
    assert {arm: (setting.rate, setting.seeds) for arm, setting in findings.best.items()} == {
        "b": (1, [0]),
        "a": (2, [0]),
    }
    assert findings.left_out == [
        "a@1/seed-1 (others do not have this seed yet)",
        "b@1/seed-1 (at step 1 of 2)",
    ]
    write_results(tmp_path, [result("a", 2, 0.55), result("b", 1, 0.52, seed=1)])
    assert read_findings(tmp_path).best == {}
    assert "others do not have this seed yet" in write_study(tmp_path)


def test_a_score_that_is_not_a_number_is_no_best(tmp_path: Path) -> None:
    nothing = result("a", 1, 0.5)
    nothing["scores"]["miou"] = {"mean": None, "spread": None}
    write_results(tmp_path, [nothing, result("a", 2, 0.1)])
    assert "| a | 2 | 1,000 | 10 | 0.100 |" in controls_table(read_findings(tmp_path).best)
    write_results(tmp_path / "other", [nothing])
    assert "| a | 1 | 1,000 | 10 |  | 12.35 ± 1.00 |" in write_study(tmp_path / "other")


def test_pairs_elsewhere_are_shown_as_far_as_they_were_drawn(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data", 4)
    study = run(study_of(tmp_path / "study", data=tmp_path / "data", arms={"a": {"method": "none"}}, eval_steps=[1]))
    write_study(tmp_path / "study")
    with Image.open(tmp_path / "study" / "samples.png") as sheet:
        assert sheet.height > 3 * 96  # condition, original, the arm
        assert 2 * 96 < sheet.width < 3 * 96
    assert len(study.pairs) == 2
    (tmp_path / "data" / "metadata.jsonl").unlink()
    write_study(tmp_path / "study")


def results_of(scores: dict[str, tuple[float, ...]]) -> list[dict[str, Any]]:
    """A result for every arm and seed."""
    return [result(arm, 1, miou, seed=seed) for arm, of_arm in scores.items() for seed, miou in enumerate(of_arm)]


THREE_SEEDS = {"a": (0.50, 0.61, 0.40), "b": (0.55, 0.68, 0.43), "c": (0.70, 0.62, 0.75)}


def test_differences_are_taken_within_seeds_and_their_interval_is_over_the_seeds(tmp_path: Path) -> None:
    write_results(tmp_path, results_of(THREE_SEEDS))
    text = write_compared(tmp_path, ["a"])
    content = json.loads((tmp_path / "differences.json").read_text())
    assert content["measure"] == "miou"
    assert content["arms"]["b"] == {"rate": 1, "by_seed": {"0": 0.55, "1": 0.68, "2": 0.43}}
    lines = {line["arm"]: line for line in content["comparisons"]}
    assert set(lines) == {"b", "c"}
    raw = []
    for arm in "bc":
        values = np.subtract(THREE_SEEDS[arm], THREE_SEEDS["a"])
        expected = stats.ttest_1samp(values, 0)
        interval = expected.confidence_interval(0.95)
        line = lines[arm]
        assert (line["rival"], line["seeds"]) == ("a", [0, 1, 2])
        assert [line[key] for key in ("difference", "low", "high", "p")] == pytest.approx(
            [values.mean(), interval.low, interval.high, expected.pvalue]
        )
        raw.append(expected.pvalue)
    smaller, larger = sorted(raw)
    holm = {smaller: 2 * smaller, larger: max(2 * smaller, larger)}
    assert [lines[arm]["p_holm"] for arm in "bc"] == pytest.approx([holm[p] for p in raw])
    low, high = lines["b"]["low"], lines["b"]["high"]
    assert f"| b | a | +0.050 [{low:+.3f}, {high:+.3f}] | {lines['b']['p_holm']:.2g} | 3 |" in text
    assert "over the seeds of the training" in text
    assert "corrected for 2 comparisons" in text


def test_a_small_file_has_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        result("a", rate, 0.3 + 0.01 * rate + 0.1 * seed, step, seed)
        for rate in (1, 2)
        for seed in (0, 1)
        for step in (1, 2)
    ]
    gone = result("a", 3, 0.9, 1)
    diverged = {key: gone[key] for key in ("arm", "rate", "seed", "steps")} | {"diverged": "not finite at step 7"}
    facts = {"base_hash": {"unet": "abc"}, "choices": {"classes": 17}, "judges": {"clip": {"model": str(tmp_path)}}}
    facts |= {"warnings": ["too few"], "settings": {"pretrained_model_name_or_path": str(tmp_path), "rank": 4}}
    more = [each | facts for each in (*rows, *results_of({"alone": (0.2, 0.25)}))]
    write_results(tmp_path / "study", [*more, diverged], ["later/seed-0"])
    table([str(tmp_path / "study"), str(tmp_path / "rows.json")])
    assert "rows.json: 8 jobs" in capsys.readouterr().out
    known, found = read_findings(tmp_path / "study"), read_rows(tmp_path / "rows.json")
    assert differences_table(differences(found, ["alone"])) == differences_table(differences(known, ["alone"]))
    assert control_rates_table(found) == control_rates_table(known)
    assert controls_table(found.best) == controls_table(known.best)
    assert found.left_out[0] == known.left_out[0]
    (of_base,) = {each["base_hash"]["unet"] for rows in found.results.values() for each in rows if "scores" in each}
    last = found.finished[0].last[0]
    assert (of_base, last["warnings"], last["judges"]) == ("abc", ["too few"], {"clip": {"model": tmp_path.name}})
    assert found.results["a@1/seed-0"][0]["settings"] == {"pretrained_model_name_or_path": tmp_path.name, "rank": 4}
    assert str(tmp_path) not in (tmp_path / "rows.json").read_text()


def test_a_small_file_needs_a_training_that_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, [result("a", 1, 0.1, 1)])
    with pytest.raises(SystemExit):
        table([str(tmp_path), str(tmp_path / "rows.json")])
    assert "nothing can be compared yet: a@1/seed-0 (at step 1 of 2)" in capsys.readouterr().err
    assert not (tmp_path / "rows.json").exists()


def test_differences_do_not_depend_on_the_order_of_the_results(tmp_path: Path) -> None:
    for name, rows in {"one": results_of(THREE_SEEDS), "two": results_of(THREE_SEEDS)[::-1]}.items():
        write_results(tmp_path / name, rows)
        write_compared(tmp_path / name, ["a", "b"])
    for file in ("differences.json", "differences.md"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text()


def test_differences_are_of_what_is_there_now(tmp_path: Path) -> None:
    write_results(tmp_path, results_of(THREE_SEEDS))
    write_compared(tmp_path, ["a"])
    (tmp_path / "results" / "b@1" / "seed-1").rename(tmp_path / "elsewhere")
    found = {each.arm: each.difference for each in read_differences(read_findings(tmp_path))}
    assert found["c"].mean == pytest.approx((0.70 - 0.50 + 0.75 - 0.40) / 2)
    assert {each.units for each in found.values()} == {2}


def test_two_arms_are_compared_once(tmp_path: Path) -> None:
    """Or Holm's correction would count one question twice."""
    write_results(tmp_path, results_of(THREE_SEEDS))
    write_compared(tmp_path, ["a", "b", "a"])
    findings = read_findings(tmp_path)
    found = read_differences(findings)
    assert {(each.arm, each.rival) for each in found} == {("b", "a"), ("c", "a"), ("c", "b")}
    assert found == differences(findings, ["a", "b"])


def test_one_seed_has_no_interval_and_table_and_page_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = []
    monkeypatch.setattr(control_pages, "write_figure", lambda *_, caption, **__: captions.append(caption))
    write_results(tmp_path, results_of({"a": (0.5,), "b": (0.6,)}))
    text = write_study(tmp_path)
    assert ONE_SEED in text
    assert captions == [[ONE_SEED]]
    text = write_compared(tmp_path, ["a"])
    assert "| b | a | +0.100 |  | 1 |" in text
    assert ONE_SEED in text
    (line,) = json.loads((tmp_path / "differences.json").read_text())["comparisons"]
    assert line.pop("difference") == pytest.approx(0.1)
    expected = {"arm": "b", "rival": "a", "seeds": [0], "low": None, "high": None, "p": None, "p_holm": None}
    assert line == expected
    section = read_section(tmp_path, "study")
    assert len(section.curves) == 3  # of two arms, and the difference
    assert all(ONE_SEED in curve.caption for curve in section.curves)
    assert f"{ONE_SEED} ±" in write_report([tmp_path], tmp_path / "page.html").read_text()


def test_curves_name_their_seeds_also_where_a_study_is_not_finished(tmp_path: Path) -> None:
    rows = [result("a", 1, 0.5), result("a", 1, 0.6, seed=1), result("b", 1, 0.5)]
    write_results(tmp_path, rows[:2])
    assert steps_caption(read_findings(tmp_path).scored) == "Means over 2 seeds of the training."
    write_results(tmp_path, rows)
    findings = read_findings(tmp_path)
    assert steps_caption(findings.scored) == "Means over 1 to 2 seeds of the training."
    assert ONE_SEED in controls_table(findings.best)  # it has only the seed that both have


def test_rates_of_one_seed_say_so_and_have_no_range(tmp_path: Path) -> None:
    results = [result("a", rate, miou, seed=seed) for rate, miou in ((1, 0.5), (2, 0.6)) for seed in (0, 1)]
    write_results(tmp_path / "one", results[::2])
    text = control_rates_table(read_findings(tmp_path / "one"))
    assert "highest - lowest" not in text
    assert ONE_SEED in text
    assert ONE_SEED in controls_table(read_findings(tmp_path / "one").best)
    write_results(tmp_path / "two", results)
    text = control_rates_table(read_findings(tmp_path / "two"))
    assert "| a | 0.500 (1) | 0.600 (2) | 0.100 |" in text
    assert ONE_SEED not in text


def test_samples_do_not_depend_on_the_batch_and_are_not_drawn_twice(tmp_path: Path) -> None:
    settings = {"method": "ether", "encoder_lr": 0.1, "output_dir": tmp_path / "run", "max_train_steps": 2}
    control.run(ControlConfig(**TRAINING | settings))
    study = ControlStudy(study_of(tmp_path / "study"), torch.device("cpu"))
    pipe, facts = load_run(tmp_path / "run"), read_run(tmp_path / "run")
    drawn = {}
    for size in (1, 4):
        folder = tmp_path / f"by-{size}"
        samples = draw_samples(pipe, facts, study.pairs, folder, Drawing(2, size, 2, 4.0), show=False)
        assert [len(of_pair) for of_pair in samples] == [2, 2]
        drawn[size] = {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob("*.png")}
    assert drawn[1].keys() == drawn[4].keys()
    assert all(np.abs(drawn[1][name] - drawn[4][name]).max() <= 2 for name in drawn[1])
    before = (tmp_path / "by-1" / "00000-0.png").stat().st_mtime_ns
    draw_samples(pipe, facts, study.pairs, tmp_path / "by-1", Drawing(2, 1, 2, 4.0), show=False)
    assert (tmp_path / "by-1" / "00000-0.png").stat().st_mtime_ns == before


def test_the_accuracy_program_draws_with_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    control.run(ControlConfig(**TRAINING | {"method": "none", "output_dir": tmp_path / "run", "max_train_steps": 1}))
    write_pairs(tmp_path / "data", 2)
    flags = ["--run", str(tmp_path / "run"), "--data", str(tmp_path / "data"), "--task", "segmentation"]
    flags += ["--segmenter", "playground", "--clip", "none", "--fid_features", "none", "--num_inference_steps", "2"]
    accuracy([*flags, "--samples", "2"])
    assert "4 pictures of 2 pairs" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "generated-control" / "results.json").read_text())
    assert results["choices"]["drawn"]["num_inference_steps"] == 2
    with pytest.raises(SystemExit):
        accuracy([*flags, "--samples", "3"])
    assert "holds pictures that were drawn otherwise" in capsys.readouterr().err


def test_scenes_to_evaluate_on_are_the_same_in_the_folder_and_in_memory(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 2, seed=5)
    with Image.open(tmp_path / "pairs" / "images" / "00001.png") as image:
        assert np.array_equal(image, draw_pair(5, 1).image)
    with pytest.raises(FileExistsError, match="is there already"):
        write_pairs(tmp_path / "pairs", 2)


CONFIGS = Path(__file__).parents[3] / "configs"


def jobs_of(recipe: str, folder: Path) -> dict[str, ControlConfig]:
    flags = ["--config", str(CONFIGS / recipe), "--output_dir", str(folder)]
    return {job.key: training_of(job, folder, 1) for job in all_jobs(parse_config(ControlStudyConfig, flags))}


def test_the_recipe_has_six_ways_at_three_rates(tmp_path: Path) -> None:
    jobs = jobs_of("eval_control.yaml", tmp_path)
    assert len(jobs) == 18
    assert {job.method for job in jobs.values()} == {"none", "ether", "ether_plus", "lora", "oft", "naive"}


def test_the_recipe_of_more_seeds_repeats_six_of_its_jobs(tmp_path: Path) -> None:
    first, more = (jobs_of(recipe, tmp_path) for recipe in ("eval_control.yaml", "eval_control_seeds.yaml"))
    assert len(more) == 12
    for key, config in more.items():
        same = first[key.rpartition("/")[0] + "/seed-0"]
        assert replace(config, seed=0) == same
        assert config.seed in (1, 2)
