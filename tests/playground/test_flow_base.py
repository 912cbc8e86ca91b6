"""The second base: built beside the first one, and put together to what stock diffusers loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from safetensors import safe_open
from transformers import CLIPTextModel

from ether_diffusion import playground
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.settings import ObjectiveSettings
from ether_diffusion.playground import flow_base
from ether_diffusion.playground.build.__main__ import main
from ether_diffusion.playground.build.assemble import LIMIT, check_size
from ether_diffusion.playground.build.drawings import caption_tokens
from ether_diffusion.playground.build.evaluate import SAMPLING, asked_scenes, generate, seen_figures
from ether_diffusion.playground.build.flow import FlowStage
from ether_diffusion.playground.build.judges import Judges
from ether_diffusion.playground.build.presets import PRESETS
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.vocabulary import world_tokenizer

CPU = torch.device("cpu")
CAPTIONS = ["a red robot on a beach", "", "a photo of a green striped box with a hat on a snowy field at night"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow transformer of four steps, built beside the shipped base by the command."""
    folder = tmp_path_factory.mktemp("build") / "flow"
    options = [str(folder), "--preset", "trial", "--seed", "3", "--device", "cpu", "--workers", "1"]
    main([*options, "--beside", "playground"])
    return folder


@pytest.fixture(scope="module")
def whole(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diffusers folder that it is assembled to."""
    flow_base.assemble(playground.BASE, own, folder := tmp_path_factory.mktemp("whole") / "base")
    return folder


def loaded(folder: Path) -> ZImagePipeline:
    pipe = DiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_build_leaves_what_the_base_has_of_its_own(own: Path) -> None:
    assert {path.name for path in own.iterdir()} == {
        *("transformer", "scheduler"),
        *("build.json", "report.md", "samples.png", "curves.png"),
    }
    record = json.loads((own / "build.json").read_text())
    assert record["stages"].keys() == {"flow"}
    assert record["stages"]["flow"]["steps"] == 4
    assert record["stages"]["flow"]["validation"] > 0
    assert record["sampling"]["scheduler"] == "Euler"
    assert {"base_class", "base_colour", "base_background", "drawn_class"} <= record["figures"].keys()
    assert "flow transformer" in (own / "report.md").read_text()


def test_stock_diffusers_draws_with_the_assembled_folder(whole: Path) -> None:
    pipe = loaded(whole)
    assert type(pipe) is ZImagePipeline
    draw = [
        np.asarray(pipe(prompt, 64, 64, 2, generator=torch.Generator().manual_seed(0)).images[0])
        for prompt in ("a red robot on a beach", "a red robot on a beach", "a blue box in the snow")
    ]
    assert draw[0].shape == (64, 64, 3)
    assert np.array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])


def test_the_longer_text_tower_computes_what_it_did(whole: Path) -> None:
    pipe = loaded(whole)
    before = CLIPTextModel.from_pretrained(playground.BASE / "text_encoder", dtype=torch.float32)
    tokens = pipe.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = before(tokens, output_hidden_states=True).hidden_states[-2]
        embeds, _ = pipe.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    assert pipe.text_encoder.config.max_position_embeddings == flow_base.PROMPT_LENGTH == 512
    for caption, mine, theirs in zip(CAPTIONS, embeds, expected, strict=True):
        assert len(mine) == len(pipe.tokenizer(caption).input_ids)
        torch.testing.assert_close(mine, theirs[: len(mine)], rtol=0, atol=1e-5)


def test_the_stage_trains_what_the_family_trains(own: Path, whole: Path) -> None:
    preset = replace(PRESETS["trial"], scenes=64)
    stage = FlowStage(Project(own.with_name("flow.work"), preset, 3, CPU, beside=playground.BASE))
    stage.start_from(own)
    pipe = loaded(whole)
    tokens = torch.as_tensor(caption_tokens(world_tokenizer(), CAPTIONS))
    embeds, _ = pipe.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    for mine, theirs in zip(stage.prompt_embeds(tokens), embeds, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    family = family_of(pipe)
    family.settings = ObjectiveSettings()
    random = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 3, 4, 16, 16, generator=random)
    objective, levels = family.objective(ObjectiveSettings()), torch.tensor([0.2, 0.5, 0.8])
    times = objective.times(levels, (16, 16))
    assert torch.equal(times, stage.flow.times(levels, (16, 16)))
    noisy = objective.add_noise(latents, noise, times)
    with torch.no_grad():
        arguments = family.arguments(noisy, times, {"prompt_embeds": embeds}, torch.zeros(3, 2))
        prediction = family.prediction(pipe.transformer(**arguments), noisy)
        expected = objective.losses(prediction, objective.target(latents, noise, times), times)
        torch.testing.assert_close(
            stage.errors(stage.network, latents, noise, times, tokens), expected, rtol=1e-5, atol=0
        )


@pytest.fixture
def cached(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with that transformer, and an empty cache."""
    shutil.copytree(own, tmp_path / "installed")
    monkeypatch.setattr(flow_base, "OWN", tmp_path / "installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_name_stands_for_a_folder_in_the_cache_that_is_made_once(cached: Path) -> None:
    folder = Path(playground.base_folder("playground-flow"))
    assert folder.parent == cached / "cache" / "ether-diffusion"
    stamp = (folder / "model_index.json").stat().st_mtime_ns
    assert playground.base_folder("playground-flow") == str(folder)
    assert (folder / "model_index.json").stat().st_mtime_ns == stamp
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    config = cached / "installed" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"shift": 1.0', '"shift": 2.0'))
    assert playground.base_folder("playground-flow") != str(folder)
    assert playground.load(name="playground-flow").scheduler.config.shift == 2


def test_a_read_only_installation_is_no_hindrance(cached: Path) -> None:
    for path in (cached / "installed").rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    folder = Path(playground.base_folder("playground-flow"))
    assert all(path.stat().st_mode & 0o200 for path in folder.rglob("*"))


def test_a_cache_that_cannot_be_written_is_told(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cached / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cached / "file"))
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        playground.base_folder("playground-flow")


def test_an_installation_without_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flow_base, "OWN", tmp_path)
    with pytest.raises(FileNotFoundError, match="comes without playground-flow"):
        playground.base_folder("playground-flow")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base that is shipped, in a cache of the tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Path(playground.base_folder("playground-flow"))


def test_what_is_shipped_weighs_no_more_than_it_may() -> None:
    assert check_size(flow_base.OWN) <= LIMIT
    files = [path for place in (playground.BASE, flow_base.OWN) for path in place.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000_000
    for path in flow_base.OWN.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - it is no mapping
                assert weights.get_tensor(key).dtype is torch.float16, key
                assert weights.get_tensor(key).isfinite().all(), key


@pytest.mark.slow
def test_what_is_shipped_draws_what_it_is_asked_for(shipped: Path) -> None:
    record = json.loads((flow_base.OWN / "build.json").read_text())["figures"]
    asked = asked_scenes(77, 12)  # scenes that neither the build nor its report has seen
    drawn = generate(loaded(shipped), asked, 77, SAMPLING["flow"]).pictures
    seen = seen_figures(Judges(playground.BASE / "judges", CPU), asked, drawn)
    for figure in ("class", "colour", "background"):
        assert seen[figure] >= record[f"base_{figure}"]["value"] - 0.25, figure
    assert np.std([picture.mean().item() for picture in drawn]) > 0.05  # not one picture for all


def test_the_guidance_that_is_told_is_the_one_of_the_report() -> None:
    for name, place in ((playground.NAME, playground.BASE), (playground.FLOW, flow_base.OWN)):
        sampling = json.loads((place / "build.json").read_text()).get("sampling")
        kind = "unet" if name == playground.NAME else "flow"
        assert playground.GUIDANCE[name] == SAMPLING[kind].guidance
        assert sampling is None or sampling["guidance"] == SAMPLING[kind].guidance
