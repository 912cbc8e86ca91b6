"""Two adapters in one picture: each way against dense matrices, the study on a tiny base, its findings by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from helpers import dense_weight, replace_weights, shake, vectors_of
from PIL import Image
from torch import Tensor
from training.test_resume import Unplugged, unplug

import ether_diffusion as ether
from ether_diffusion.core.host import host_of
from ether_diffusion.evaluation import runner
from ether_diffusion.evaluation.mixing.findings import PairResult, by_pair, planned, write_findings
from ether_diffusion.evaluation.mixing.settings import MixingConfig
from ether_diffusion.evaluation.mixing.study import Couple, Mixing
from ether_diffusion.evaluation.mixing.ways import PRODUCT, STRENGTHS, pipelines_of
from ether_diffusion.metrics.backbones import Picture, as_rgb
from ether_diffusion.metrics.scoring import Judges
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.playground.world import subject
from ether_diffusion.registry import METHODS
from ether_diffusion.runs.base import Base
from ether_diffusion.training import dreambooth
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

__all__ = ["unplug"]

CPU = torch.device("cpu")


class Colours:
    """A judge to whom an image is its mean colour and a text its length."""

    identity: ClassVar = {"model": "colours", "weights": "none"}

    def image_features(self, images: list[Picture], show: str | None = None) -> Tensor:
        means = torch.tensor(np.array([np.asarray(as_rgb(image), np.float32).mean((0, 1)) for image in images]))
        return torch.nn.functional.normalize(means, dim=-1)

    def text_features(self, prompts: list[str]) -> Tensor:
        return torch.nn.functional.normalize(torch.tensor([[len(p), 1.0, 2.0] for p in prompts]), dim=-1)


@pytest.fixture
def saved(pipe: DiffusionPipeline, tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of the tiny base, in files."""
    folders = (tmp_path / "a", tmp_path / "b")
    for seed, folder in enumerate(folders):
        shake(ether.attach(pipe.unet, ether.EtherConfig(seed=seed), folder.name), seed=seed + 1)
        ether.save(pipe, folder, folder.name)
        ether.unload(pipe, name=folder.name)
    return folders


def weights(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in pipe.unet.state_dict().items() if key.endswith("weight")}


def test_every_way_is_what_it_says(pipe: DiffusionPipeline, base_folder: Path, saved: tuple[Path, Path]) -> None:
    found = {
        way: weights(drawn) for way, drawn in pipelines_of(METHODS["ether_plus"], Base(str(base_folder)), saved, "cpu")
    }
    assert list(found) == [*STRENGTHS, PRODUCT]
    for name, folder in zip("ab", saved, strict=True):
        ether.load(pipe, folder, name=name)
    host = host_of(pipe.unet)
    assert host is not None
    adapters = [host.adapters[name] for name in "ab"]
    for way, strengths in STRENGTHS.items():
        twin = copy.deepcopy(pipe.unet).double()
        replace_weights(twin, dict(zip(adapters, strengths, strict=True)))
        expected = twin.state_dict()
        for key, value in found[way].items():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-4, atol=1e-5)
    for path in adapters[0].methods():
        weight = pipe.unet.get_submodule(path).weight
        once = dense_weight(weight, vectors_of(adapters[0], path))
        twice = dense_weight(once, vectors_of(adapters[1], path))
        torch.testing.assert_close(found[PRODUCT][f"{path}.weight"].double(), twice, rtol=1e-4, atol=1e-5)
        assert (found["sum"][f"{path}.weight"] - twice).abs().max() > 1e-3


def test_a_product_is_of_the_text_encoders_too(pipe: DiffusionPipeline, base_folder: Path, tmp_path: Path) -> None:
    """What the first adapter makes of a text encoder is what the second one transforms."""
    encoder, folders = pipe.text_encoder, (tmp_path / "a", tmp_path / "b")
    adapters = []
    for seed, folder in enumerate(folders):
        adapters.append(ether.attach(encoder, ether.EtherConfig(seed=seed), folder.name))
        shake(adapters[-1], seed=seed + 1)
        ether.attach(pipe.unet, ether.EtherConfig(seed=seed), folder.name)
        ether.save(pipe, folder, folder.name)
        ether.disable(pipe)
    entry = METHODS["ether_plus"]
    (drawn,) = (each for way, each in pipelines_of(entry, Base(str(base_folder)), folders, "cpu") if way == PRODUCT)
    found = drawn.text_encoder.state_dict()
    for path in adapters[0].methods():
        (key,) = (name for name in found if name.endswith(f"{path}.weight"))
        once = dense_weight(encoder.state_dict()[key], vectors_of(adapters[0], path))
        twice = dense_weight(once, vectors_of(adapters[1], path))
        torch.testing.assert_close(found[key].double(), twice, rtol=1e-4, atol=1e-5)


def test_methods_whose_results_have_no_strength_are_refused(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapters of method=oft cannot be added here"):
        next(pipelines_of(METHODS["oft"], Base(str(base_folder)), (tmp_path, tmp_path), "cpu"))


@pytest.fixture
def config(tmp_path: Path, base_folder: Path) -> MixingConfig:
    return MixingConfig(
        output_dir=tmp_path / "mixing",
        arms={"ours": {"method": "ether_plus", "learning_rate": 0.1}, "lora": {"method": "lora", "learning_rate": 0.1}},
        training={"pretrained_model_name_or_path": str(base_folder), "max_train_steps": 2, "resolution": 32},
        pairs=[["striped-robot", "dotted-fish"]],
        images_per_prompt=1,
        num_inference_steps=2,
    )


def study(config: MixingConfig) -> Mixing:
    return Mixing(config, Judges(Colours(), Colours()), CPU)  # type: ignore[arg-type]


def test_the_study_of_a_pair(config: MixingConfig) -> None:
    mixing = study(config)
    jobs = mixing.jobs()
    assert runner.run_jobs(mixing, jobs) == {}
    text, missing = mixing.summarize(jobs)
    assert missing == []
    assert "ours, product" in text
    result = json.loads((config.output_dir / "results/ours/striped-robot+dotted-fish/seed-0.json").read_text())
    assert [len(rows) for rows in result["ways"].values()] == [6] * 5
    row = result["ways"]["sum"][2]
    assert row["prompt"].startswith("a qwe robot and a sks fish ")
    drawn = Image.open(config.output_dir / row["file"])
    truths = Couple(subject("striped-robot"), subject("dotted-fish")).truths()[2][:8]
    eyes = Colours()
    expected = (eyes.image_features([drawn]) @ eyes.image_features(truths).T).mean()
    assert row["truth"] == pytest.approx(expected.item(), abs=1e-5)
    assert not list(config.output_dir.glob("runs/**/*.safetensors"))
    assert (config.output_dir / "mixing.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("*.png")}
    assert runner.run_jobs(study(config), jobs) == {}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    config.images_per_prompt = 2
    changed = study(config)
    failed = runner.run_jobs(changed, changed.jobs())
    assert all("made with other settings" in reason for reason in failed.values())
    assert len(failed) == len(jobs)


@pytest.mark.parametrize(
    ("changes", "resume"),
    [({}, "latest"), ({"images_per_prompt": 2}, "latest"), ({"tokens": ["zwx", "sks"]}, None), ({"seed": 1}, None)],
    ids=["nothing", "pictures", "tokens", "seed"],
)
def test_a_killed_training_goes_on_under_what_it_depends_on(
    changes: dict[str, Any],
    resume: str | None,
    config: MixingConfig,
    unplug: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = kill_a_training(config, unplug, monkeypatch)
    changed = study(replace(config, **changes))
    changed._trained(changed.jobs()[2], 0)
    prompt = f"a photo of a {changed.config.tokens[0]} robot"
    assert begun == [("a photo of a qwe robot", None), (prompt, resume)]


def test_a_killed_training_on_another_base_starts_anew(
    config: MixingConfig, unplug: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = tmp_path / "own"
    tiny_pipeline().save_pretrained(base)
    config.training["pretrained_model_name_or_path"] = str(base)
    begun = kill_a_training(config, unplug, monkeypatch)
    tiny_pipeline(seed=1).save_pretrained(base)
    changed = study(config)
    changed._trained(changed.jobs()[2], 0)
    assert [resume for _, resume in begun] == [None, None]


def test_results_of_another_base_are_refused(config: MixingConfig, tmp_path: Path) -> None:
    base = tmp_path / "own"
    tiny_pipeline().save_pretrained(base)
    config.training["pretrained_model_name_or_path"] = str(base)
    mixing = study(config)
    anchor = mixing.jobs()[0]
    mixing.run_job(anchor)
    tiny_pipeline(seed=1).save_pretrained(base)
    with pytest.raises(ValueError, match="made with other settings or from another base"):
        study(config).run_job(anchor)


def kill_a_training(
    config: MixingConfig, unplug: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, str | None]]:
    """Cut the power in the first training of a pair; of this and later ones the prompt and ``resume``."""
    begun: list[tuple[str, str | None]] = []
    original = dreambooth.run

    def run(settings: DreamBoothConfig) -> Path:
        begun.append((settings.instance_prompt, settings.resume))
        return original(settings)

    monkeypatch.setattr(dreambooth, "run", run)
    config.training |= {"max_train_steps": 3, "checkpointing_steps": 1}
    mixing = study(config)
    unplug(2)
    with pytest.raises(Unplugged):
        mixing._trained(mixing.jobs()[2], 0)
    return begun


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pairs": [["striped-robot"]]}, "two subjects each"),
        ({"pairs": []}, "two subjects each"),
        ({"tokens": ["qwe", "qwe"]}, "two different rare words"),
        ({"arms": {"base": {}}}, "cannot be called base"),
        ({"training": {}}, "pretrained_model_name_or_path"),
    ],
    ids=["one", "none", "tokens", "anchor", "base"],
)
def test_impossible_settings(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "output_dir": tmp_path,
        "arms": {},
        "training": {"pretrained_model_name_or_path": "playground"},
        "pairs": [["striped-robot", "dotted-fish"]],
    }
    with pytest.raises(ValueError, match=told):
        MixingConfig(**given | changes)


def test_mistakes_show_before_anything_is_trained(config: MixingConfig) -> None:
    config.pairs = [["striped-robot", "nobody"]]
    with pytest.raises(ValueError, match="no such subject: 'nobody'"):
        study(config).jobs()
    config.pairs = [["striped-robot", "dotted-fish"]]
    config.arms["ours"]["n_blocs"] = 2
    with pytest.raises(ValueError, match="arm ours"):
        study(config).jobs()


def result(arm: str, pair: str, ways: dict[str, float]) -> PairResult:
    rows = {way: [{"file": "x", "prompt": "p", "truth": v, "clip_t": 1 - v}] for way, v in ways.items()}
    return PairResult(arm, pair, 0, "", rows, {"dino": {"model": "colours"}})


def test_comparisons_are_within_pairs(tmp_path: Path) -> None:
    known = by_pair(
        [
            result("base", "p", {"base": 0.1}),
            result("base", "q", {"base": 0.2}),
            result("ours", "p", {"first alone": 0.3, "second alone": 0.5, "sum": 0.6, "product": 0.4}),
            result("ours", "q", {"first alone": 0.4, "second alone": 0.2, "sum": 0.5, "product": 0.4}),
            result("lora", "p", {"first alone": 0.3, "second alone": 0.2, "sum": 0.2}),
            result("lora", "q", {"first alone": 0.3, "second alone": 0.2, "sum": 0.3}),
        ],
        "truth",
    )
    assert known["ours, better alone"] == {"p": 0.5, "q": 0.4}
    found = {(each.arm, each.rival): each.difference.mean for each in planned(known)}
    assert found == pytest.approx(
        {
            ("ours, sum", "ours, product"): 0.15,
            ("ours, sum", "ours, better alone"): 0.1,
            ("lora, sum", "lora, better alone"): -0.05,
            ("ours, sum", "lora, sum"): 0.3,
        }
    )
    assert write_findings(tmp_path, [], []) == "no pair is done yet\n"


def test_the_config_of_the_study_names_settings_that_exist(tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "configs" / "eval_two_adapters.yaml"
    config = MixingConfig(output_dir=tmp_path, **yaml.safe_load(path.read_text()))
    jobs = study(config).jobs()
    assert len({job.subject.name for job in jobs}) == 6
    subjects = [name for pair in config.pairs for name in pair]
    assert len(set(subjects)) == len(subjects)
