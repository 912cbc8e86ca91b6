"""The whole build at its smallest: from an empty folder to a pipeline that draws and judges that judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

from ether_diffusion.playground.build.__main__ import adjust, main, parser
from ether_diffusion.playground.build.assemble import LIMIT, check_size
from ether_diffusion.playground.build.drawings import picture_array, to_unit
from ether_diffusion.playground.build.evaluate import TARGETS, evaluate
from ether_diffusion.playground.build.judges import Judges
from ether_diffusion.playground.build.presets import BASES, PLAYGROUND, PRESETS
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.report import markdown
from ether_diffusion.playground.build.runner import check_target, run
from ether_diffusion.playground.world import COLOURS, KINDS, random_scene

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build in two runs: the drawings and the autoencoder, then everything."""
    folder = tmp_path_factory.mktemp("build") / "base"
    options = [str(folder), "--preset", "trial", "--seed", "3", "--device", "cpu", "--workers", "1"]
    main([*options, "--stages", "draw", "autoencoder"])
    assert not folder.exists()
    weights = work_of(folder) / "autoencoder" / "model" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    main(options)
    assert weights.stat().st_mtime_ns == before, "a finished stage was run again"
    return folder


def work_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.work")


def test_the_folder_is_a_pipeline_that_draws(built: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(built).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    draw = [
        np.asarray(pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0])
        for prompt in ("a red robot on a beach", "a red robot on a beach", "a blue box in the snow")
    ]
    assert draw[0].shape == (64, 64, 3)
    assert np.array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])


def test_it_does_not_tell_where_it_was_made(built: Path) -> None:
    for path in (*built.rglob("*.json"), *built.rglob("*.md")):
        assert str(built.parent) not in path.read_text(encoding="utf-8"), path


def test_all_weights_are_fp16(built: Path) -> None:
    files = [path for path in built.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt")]
    assert len(files) == 6
    for path in files:
        assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {torch.float16}, path


def test_the_text_encoder_is_the_judges_text_tower(built: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(built).to(torch.float32)
    clip = CLIPModel.from_pretrained(built / "judges" / "clip", dtype=torch.float32)
    tokens = pipe.tokenizer(["a red robot", "a box"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        mine = clip.text_projection(pipe.text_encoder(tokens).pooler_output)
        torch.testing.assert_close(mine, clip.get_text_features(tokens).pooler_output, rtol=0, atol=0)
    judge = CLIPTokenizer.from_pretrained(built / "judges" / "clip")
    assert judge.get_vocab() == pipe.tokenizer.get_vocab()


def test_the_judges_load_and_take_pictures_of_any_processor(built: Path) -> None:
    judges = Judges(built / "judges", CPU)
    pictures = picture_array([random_scene(11, index) for index in range(3)])
    tensors = to_unit(torch.from_numpy(pictures))
    assert set(judges.kinds(tensors)) <= set(KINDS)
    assert set(judges.colours(tensors)) <= set(COLOURS)
    assert judges.features(tensors).shape == (3, judges.dino.config.hidden_size)
    assert judges.regions(tensors).shape == (3, 64, 64)
    for judge in ("clip", "dino", "segmenter"):
        processor = AutoImageProcessor.from_pretrained(built / "judges" / judge, backend="pil")
        values = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt").pixel_values
        torch.testing.assert_close(values, tensors, atol=1e-6, rtol=0)


def test_the_record_says_what_was_built_and_how_good_it_is(built: Path) -> None:
    record = json.loads((built / "build.json").read_text())
    assert record["seed"] == 3
    assert {name: entry["steps"] for name, entry in record["stages"].items()} == dict.fromkeys(BASES["unet"], 4)
    assert record["bytes"] == sum(path.stat().st_size for path in built.rglob("*.safetensors")) <= LIMIT
    for name, target in TARGETS.items():
        entry = record["figures"][name]
        assert entry["target"] == target
        assert entry["reached"] == (entry["value"] >= target)
    assert {"torch", "diffusers", "transformers"} <= record["libraries"].keys()
    report = (built / "report.md").read_text()
    assert f"{record['figures']['autoencoder_psnr']['value']:.3f} | 27.000 MISSED" in report
    assert Image.open(built / "samples.png").width > 1000
    assert Image.open(built / "curves.png").width > 1000


def test_a_build_that_goes_on_from_another_says_so(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    options = [str(folder), "--preset", "trial", "--seed", "3", "--device", "cpu", "--workers", "1"]
    main([*options, "--from_build", str(built), "--steps", "dino=0", "segmenter=0"])
    record, before = (json.loads((each / "build.json").read_text()) for each in (folder, built))
    assert record["started_from"]["stages"] == before["stages"]
    assert record["stages"]["dino"]["steps"] == 0
    new, old = (load_file(each / "judges" / "dino" / "model.safetensors") for each in (folder, built))
    assert all(torch.equal(new[key], old[key]) for key in old)
    for file, frozen in (("vae", "encoder."), ("text_encoder", "")):
        name = next((built / file).glob("*.safetensors")).name
        new, old = (load_file(each / file / name) for each in (folder, built))
        same = {key for key in old if torch.equal(new[key], old[key])}
        assert {key for key in old if key.startswith(frozen)} <= same
        assert file == "text_encoder" or same != set(old)


def test_the_report_tells_reached_from_missed(built: Path) -> None:
    record = json.loads((built / "build.json").read_text())
    record["figures"] = {"clip_class": {"value": 0.98, "target": 0.97, "reached": True}, "drawn_class": {"value": 1.0}}
    text = markdown(record)
    assert "| clip_class | 0.980 | 0.970 reached |" in text
    assert "| drawn_class | 1.000 |  |" in text


def test_the_figures_are_measured_on_the_shipped_weights(built: Path) -> None:
    preset = PRESETS["trial"]
    figures, samples = evaluate(built, 3, preset.held_out, preset.images, CPU)
    record = json.loads((built / "build.json").read_text())
    assert figures == pytest.approx({name: entry["value"] for name, entry in record["figures"].items()})
    assert len(samples.captions) == len(samples.pictures) == preset.images
    assert samples.pictures.min() >= -1


def test_the_autoencoder_keeps_its_scaling_factor(built: Path) -> None:
    vae = AutoencoderKL.from_pretrained(built / "vae")
    pictures = to_unit(torch.from_numpy(picture_array([random_scene(3, index) for index in range(64)])))
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean
    assert latents.shape == (64, 4, 16, 16)
    assert latents.std().item() * vae.config.scaling_factor == pytest.approx(1, abs=2e-3)


def test_weights_above_the_limit_are_an_error(built: Path) -> None:
    total = check_size(built)
    assert check_size(built, limit=total) == total
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model\.safetensors"):
        check_size(built, limit=total - 1)


def test_a_stage_without_what_it_needs_says_so(tmp_path: Path) -> None:
    project = Project(tmp_path / "work", PRESETS["trial"], 0, CPU)
    with pytest.raises(FileNotFoundError, match="unet needs autoencoder, clip"):
        run(project, tmp_path / "base", ("unet",))


def test_a_work_folder_belongs_to_one_seed_and_size(built: Path) -> None:
    project = Project(work_of(built), PRESETS["trial"], 4, CPU)
    with pytest.raises(ValueError, match="another seed"):
        run(project, built, ("draw",))
    larger = replace(PRESETS["trial"], architecture=PLAYGROUND)
    with pytest.raises(ValueError, match="another architecture"):
        run(Project(work_of(built), larger, 3, CPU), built, ("draw",))


def test_only_a_build_is_ever_replaced(tmp_path: Path, built: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not the result of a build"):
        check_target(tmp_path)
    check_target(built)
    check_target(tmp_path / "new")


def test_options_change_the_stages_they_name() -> None:
    given = parser().parse_args(["x", "--steps", "clip=7", "unet=9", "--minutes", "unet=0.5", "--lr", "dino=1e-4"])
    preset = adjust(PRESETS["cpu"], dict(given.steps), dict(given.batch), dict(given.minutes), dict(given.lr))
    default = PRESETS["cpu"].training
    assert preset.training["clip"] == replace(default["clip"], steps=7)
    assert preset.training["unet"] == replace(default["unet"], steps=9, minutes=0.5)
    assert preset.training["dino"] == replace(default["dino"], lr=1e-4)
    assert preset.training["segmenter"] == default["segmenter"]


@pytest.mark.parametrize("wrong", ["clip", "nets=3", "clip=many"])
def test_a_wrong_assignment_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["x", "--steps", wrong])
    assert wrong.split("=")[0] in capsys.readouterr().err
