"""The program as it is typed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ether_diffusion.cli.programs.studies import bench as main
from ether_diffusion.evaluation.paper.settings import EnergyConfig, RatesConfig
from ether_diffusion.evaluation.subjects.arms import all_jobs, is_anchor, training_of
from ether_diffusion.evaluation.subjects.protocols import load_protocol
from ether_diffusion.evaluation.subjects.settings import ANCHORS, ChoosingConfig
from ether_diffusion.evaluation.subjects.summary import REAL

ROOT = Path(__file__).parents[3]


def test_a_benchmark_on_the_playground(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((ROOT / "configs" / "eval_playground.yaml").read_text())
    config["training"]["max_train_steps"] = 2
    config["arms"], config["seeds"] = {"ether_plus": {"method": "ether_plus"}}, [0]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "small.yaml"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--subjects=[gift-box]", "--images_per_prompt", "1", "--num_inference_steps", "2"]
    main(arguments)
    assert "| ether_plus |" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["arm"] for row in summary["rows"]] == [REAL, *ANCHORS, "ether_plus"]
    assert summary["missing"] == []
    assert summary["primary"] == "truth"
    base, truth, copies, noise, tuned = summary["rows"][1:]
    likeness = {row["arm"]: row["scores"]["truth"]["mean"] for row in summary["rows"][1:]}
    assert likeness["truth"] > 0.8 > likeness["copies"] > likeness["base"]  # copies of the references are no answer
    assert copies["scores"]["dino"]["mean"] > 0.85 > truth["scores"]["dino"]["mean"]
    assert copies["scores"]["drift_scaled"]["mean"] == pytest.approx(1)
    assert noise["scores"]["clip_t"]["mean"] < 0.2 < truth["scores"]["clip_t"]["mean"]
    assert base["scores"]["drift"]["mean"] == pytest.approx(0, abs=1e-6)
    assert tuned["scores"]["drift"]["mean"] > 1e-6
    assert 0 < tuned["distances"]["transforms"] < 2**0.5 * 2  # four blocks
    (box,) = load_protocol("playground", None, tmp_path / "out" / "subjects", ["gift-box"])
    images = len(box.prompts) + len(box.unrelated) + config["class_images"]
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 4 * images + len(box.prompts)
    assert not (tmp_path / "out" / "runs").exists() or not list((tmp_path / "out" / "runs").rglob("*.safetensors"))


def test_processes_share_the_jobs_and_one_that_fails_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    for shade in (40, 200):
        Image.new("RGB", (64, 64), (shade, 90, 60)).save(tmp_path / "good" / f"{shade}.png")
    (tmp_path / "bad" / "0.png").write_bytes(b"no picture")
    entries = [
        {"name": name, "class": "ball", "references": name, "prompts": ["a {token} ball"]} for name in ("good", "bad")
    ]
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(entries))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    command += [str(ROOT / "eval" / "dreambench.py"), "--output_dir", str(tmp_path / "out")]
    command += ["--protocol", str(tmp_path / "protocol.yaml"), "--dino", "playground", "--clip", "playground"]
    command += ["--training", '{"pretrained_model_name_or_path": "playground", "max_train_steps": 2}']
    command += ["--arms", '{"ether": {"method": "ether"}}', "--num_inference_steps", "2", "--images_per_prompt", "1"]
    command += ["--class_images", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {row["arm"]: row["images"] for row in summary["rows"]} == {
        **{REAL: 0, "base": 1, "copies": 1, "noise": 1},
        "ether": 1,
    }
    assert summary["missing"] == [f"{arm}/bad/seed-0" for arm in ("base", "copies", "noise", "ether")]
    assert "ether/bad/seed-0: " in ended.stderr


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    base = ["--training", '{"pretrained_model_name_or_path": "playground"}']
    with pytest.raises(SystemExit, match="pretrained_model_name_or_path"):
        main(out)
    with pytest.raises(SystemExit, match=r"arm mine: .*metod"):
        main([*out, *base, "--arms", '{"mine": {"metod": "ether"}}'])
    with pytest.raises(SystemExit, match=r"no subject 'gift-bx'.*gift-box"):
        main([*out, *base, "--subjects=[gift-bx]"])


def test_the_configs_name_settings_that_exist(tmp_path: Path) -> None:
    others = ("control", "two_adapters")
    of_subjects = [p for p in (ROOT / "configs").glob("eval_*.yaml") if not any(other in p.name for other in others)]
    assert len(of_subjects) >= 6
    kinds = {"eval_energy": EnergyConfig, "eval_chosen_step": ChoosingConfig}
    for path in sorted(of_subjects):
        config = kinds.get(path.stem, RatesConfig)(output_dir=tmp_path, **yaml.safe_load(path.read_text()))
        for job in all_jobs(config, load_protocol("playground", None, tmp_path)):
            if not is_anchor(job):
                training_of(job, config, tmp_path)


def settings_of(recipe: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    return settings


@pytest.mark.parametrize(
    ("recipe", "own"),
    [
        ("eval_playground_flow", {"arms", "guidance_scale", "planned", "secondary", "seeds", "strengths", "training"}),
        ("eval_playground_defaults", {"against", "arms", "planned", "secondary"}),
        ("eval_playground_strengths", {"arms", "strengths"}),
        ("eval_playground_peft", {"against", "arms", "planned", "secondary"}),
    ],
)
def test_benchmarks_of_one_protocol_differ_only_in_what_they_say(recipe: str, own: set[str]) -> None:
    main, other = settings_of("eval_playground"), settings_of(recipe)
    assert {key for key in main.keys() | other.keys() if main.get(key) != other.get(key)} == own
    for each in (main, other):
        each["training"].pop("pretrained_model_name_or_path")
    assert other["training"] == main["training"]  # the budget


def test_the_defaults_are_those_of_every_method_of_the_benchmark(tmp_path: Path) -> None:
    tuned, defaults = settings_of("eval_playground")["arms"], settings_of("eval_playground_defaults")["arms"]
    assert defaults == {f"{arm}_default": {"method": settings["method"]} for arm, settings in tuned.items()}


def test_the_rates_of_the_flow_base_are_searched_for_on_other_subjects() -> None:
    arms = settings_of("eval_playground_flow")["arms"]
    higher = {name.removesuffix("_tenfold"): arms.pop(name) for name in list(arms) if name.endswith("_tenfold")}
    assert list(arms) == ["ether", "ether_plus", "lora", "delora", "oft", "full"]
    assert list(higher) == ["ether_plus", "free", "lora", "delora"]
    for name, settings in higher.items():
        tuned = {**arms["ether_plus"], "method": "ether_plus_free"} if name == "free" else arms[name]
        assert settings == tuned | {"learning_rate": pytest.approx(10 * tuned["learning_rate"])}
    searches = [settings_of(f"eval_playground_flow_rates{name}") for name in ("", "_methods")]
    searched = {arm: settings for search in searches for arm, settings in search["arms"].items()}
    assert searched.keys() == arms.keys()
    for arm, settings in searched.items():
        assert {k: v for k, v in settings.items() if k != "learning_rate"} == {
            k: v for k, v in arms[arm].items() if k != "learning_rate"
        }
        rates = settings["learning_rate"]
        assert rates == sorted(rates)
        assert arms[arm]["learning_rate"] in rates[1:-1]  # it has a neighbour on both sides
        if arm != "ether_plus":
            assert all(b / a == pytest.approx(10**0.5, rel=0.03) for a, b in itertools.pairwise(rates))  # half decades
    for search in searches:
        assert not set(search["subjects"]) & set(settings_of("eval_playground_flow")["subjects"])
        assert search["training"] == settings_of("eval_playground_flow")["training"]


def test_the_script_says_what_it_takes() -> None:
    script = str(ROOT / "eval" / "dreambench.py")
    ended = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "--images_per_prompt" in ended.stdout
