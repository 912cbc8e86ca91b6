"""Training on prompts beyond CLIP's 77 tokens: one number of chunks for the whole run, told, recorded, drawn alike."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families.tiny import build
from PIL import Image
from safetensors.torch import load_file
from training.helpers import draw_photo, metrics, pixels, provenance, relative_change, same_tensors, samples, trained

import ether_diffusion as ether
from ether_diffusion.cli import main
from ether_diffusion.families.sd import StableDiffusion
from ether_diffusion.families.settings import FamilySettings
from ether_diffusion.runs.comparison import write_comparison
from ether_diffusion.runs.drawing import load_run
from ether_diffusion.runs.lora import LORA_FILE
from ether_diffusion.runs.record import RunRecordError, read_run
from ether_diffusion.training import dreambooth, memory
from ether_diffusion.training.base_model import BaseModelError, describe_base
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.memory import plan, report
from ether_diffusion.training.model import DenoisingModel
from ether_diffusion.training.program import run_program
from ether_diffusion.training.sections import BaseSection

Train = Callable[..., Path]


def words(number: int) -> str:
    """So many words, each a token of the tiny base."""
    return " ".join("abcdefghijklmnopqrstuvwxyz"[at % 26] for at in range(number))


LONG = words(170)
"""Three chunks."""


@pytest.fixture
def captioned(tmp_path: Path, photos: Path) -> Path:
    """Three photos, one with a caption of three chunks, one of two, one without."""
    folder = tmp_path / "captioned"
    shutil.copytree(photos, folder)
    (folder / "0.txt").write_text(LONG)
    (folder / "1.txt").write_text(words(100))
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of all encoded prompts that the denoiser is given in training."""
    shapes: list[torch.Size] = []
    original = DenoisingModel._prompts

    def prompts(model: DenoisingModel, asked: list[str]) -> Any:
        found = original(model, asked)
        shapes.append(found["prompt_embeds"].shape)
        return found

    monkeypatch.setattr(DenoisingModel, "_prompts", prompts)
    return shapes


@pytest.mark.parametrize("train_text_encoder", [False, True])
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_every_prompt_of_a_run_has_the_chunks_of_the_longest(
    train: Train, captioned: Path, seen: list[torch.Size], xl: bool, train_text_encoder: bool, xl_folder: Path
) -> None:
    base = {"pretrained_model_name_or_path": str(xl_folder)} if xl else {}
    run = train(
        instance_data_dir=captioned,
        prompt_chunks="auto",
        train_text_encoder=train_text_encoder,
        learning_rate=0.1,
        **base,
    )
    assert {shape[1] for shape in seen} == {3 * 77}
    assert read_run(run).config["prompt_chunks"] == 3
    assert provenance(run)["prompt_chunks"] == 3
    assert read_run(run).family_settings == FamilySettings(prompt_chunks=3)


def test_prompts_of_samples_and_of_class_images_count_as_well(train: Train, captioned: Path, tmp_path: Path) -> None:
    assert read_run(train("one", prompt_chunks="auto")).config["prompt_chunks"] == 1
    shown = train("two", prompt_chunks="auto", validation_prompt=words(80))
    assert read_run(shown).config["prompt_chunks"] == 2
    for number in range(2):
        draw_photo(tmp_path / "class" / f"{number}.png", number)
    (tmp_path / "class" / "1.txt").write_text(words(230))
    known = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "num_class_images": 2}
    run = train("three", prompt_chunks="auto", class_prompt="a dog", **known)
    assert read_run(run).config["prompt_chunks"] == 4
    run = train("four", prompt_chunks="auto", **known | {"class_data_dir": None, "class_prompt": words(160)})
    assert read_run(run).config["prompt_chunks"] == 3


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_the_adapter_learns_from_what_only_a_later_chunk_says(
    train: Train, photos: Path, tmp_path: Path, xl: bool, xl_folder: Path
) -> None:
    base = {"pretrained_model_name_or_path": str(xl_folder)} if xl else {}

    def weights(name: str, last: str, chunks: int) -> Any:
        folder = tmp_path / f"photos-{name}"
        shutil.copytree(photos, folder)
        for number in range(3):
            (folder / f"{number}.txt").write_text(f"{words(75)} {last}")
        return trained(train(name, instance_data_dir=folder, prompt_chunks=chunks, checkpointing_steps=3, **base), 3)

    assert same_tensors(weights("cut x", "x", 1), weights("cut y", "y", 1))
    assert not same_tensors(weights("x", "x", 2), weights("y", "y", 2))


def test_a_trained_text_encoder_has_the_gradients_of_all_chunks(train: Train, captioned: Path) -> None:
    """Encoded in each step, the adapter of the denoiser sees what it sees of prompts that were encoded before."""
    common: dict[str, Any] = {"instance_data_dir": captioned, "prompt_chunks": 3, "learning_rate": 0.01}
    frozen = train("frozen", **common)
    moving = train("moving", train_text_encoder=True, text_encoder_lr=0.0, **common)
    losses = [[row["loss"] for row in metrics(run)] for run in (frozen, moving)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    learning = train("learning", train_text_encoder=True, **common)
    assert metrics(learning)[-1]["loss"] != losses[1][-1]


def test_subjects_side_by_side_have_the_chunks_of_the_longest_of_all(
    train: Train, photos: Path, tmp_path: Path
) -> None:
    """Each as if it were trained alone with that number: adapters of its own act on all chunks of its prompts."""
    for name, caption in (("cat", LONG), ("dog", "a dog")):
        shutil.copytree(photos, tmp_path / "subjects" / name)
        for number in range(3):
            (tmp_path / "subjects" / name / f"{number}.txt").write_text(caption)
    common: dict[str, Any] = {"train_text_encoder": True, "adam_epsilon": 1e-3, "learning_rate": 1e-2}
    both = train("both", subjects_dir=tmp_path / "subjects", instance_data_dir=Path(), prompt_chunks="auto", **common)
    for name in ("cat", "dog"):
        assert read_run(both / name).config["prompt_chunks"] == 3
        single = train(name, instance_data_dir=tmp_path / "subjects" / name, prompt_chunks=3, **common)
        found, expected = (load_file(folder / "ether_weights.safetensors") for folder in (both / name, single))
        assert relative_change(found, expected) < 1e-5
    cat, dog = (load_file(both / name / "ether_weights.safetensors") for name in ("cat", "dog"))
    assert relative_change(cat, dog) > 1e-3


def test_what_is_cut_is_told_with_the_setting_that_helps(
    train: Train, captioned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(instance_data_dir=captioned, prompt_chunks=2, validation_prompt=words(160))
    (told,) = [record.getMessage() for record in caplog.records if "sees only the beginning" in record.getMessage()]
    assert told.startswith("text_encoder sees only the beginning of 2 of 4 prompts: ")
    assert f'of "{LONG}" it does not see "{LONG.removeprefix(words(150)).strip()}"' in told
    assert told.endswith("; --prompt_chunks auto encodes all of every prompt")
    caplog.clear()
    train("all", instance_data_dir=captioned, prompt_chunks="auto", train_text_encoder=True)
    assert "sees only the beginning" not in caplog.text
    train("moving", instance_data_dir=captioned, train_text_encoder=True)
    assert "text_encoder sees only the beginning of 2 of 3 prompts" in caplog.text


def test_a_resume_with_another_number_of_chunks_is_told(
    train: Train, captioned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common: dict[str, Any] = {"instance_data_dir": captioned, "checkpointing_steps": 3}
    straight = train("straight", max_train_steps=6, prompt_chunks="auto", **common)
    run = train(max_train_steps=3, prompt_chunks="auto", **common)
    caplog.clear()
    train(max_train_steps=6, prompt_chunks="auto", resume="latest", **common)
    told = [record.getMessage() for record in caplog.records if "resuming with another" in record.getMessage()]
    assert told == ["resuming with another setting, max_train_steps: 3 → 6"]
    assert metrics(run) == metrics(straight)
    assert same_tensors(trained(run, 6), trained(straight, 6))
    for asked, number in ((2, 2), (1, 1)):
        caplog.clear()
        copy = run.with_name(f"{run.name}-{number}")
        shutil.copytree(run, copy)
        train(copy.name, max_train_steps=9, prompt_chunks=asked, resume="latest", **common)
        told = (
            f"number of chunks of a prompt (prompt_chunks), 3 → {number}: the result is not that of the uninterrupted"
        )
        assert told in caplog.text
        assert caplog.text.count("3 → ") == 1


def test_stored_encodings_are_not_taken_for_another_number_of_chunks(
    train: Train, captioned: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"instance_data_dir": captioned, "checkpointing_steps": 3}
    fresh = train("fresh", prompt_chunks=3, **common)
    train("two", prompt_chunks=2, cache_dir=tmp_path / "cache", **common)
    stored = train("three", prompt_chunks=3, cache_dir=tmp_path / "cache", **common)
    assert same_tensors(trained(stored, 3), trained(fresh, 3))


def test_class_images_of_another_number_of_chunks_are_others(train: Train, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "with_prior_preservation": True,
        "class_prompt": words(90),
        "class_data_dir": tmp_path / "class",
        "num_class_images": 1,
    }
    train("one", **common)
    train("again", overwrite=True, **common)
    with pytest.raises(ValueError, match="prompt_chunks: 1 → 2"):
        train("two", prompt_chunks="auto", **common)
    record = tmp_path / "class" / "generated.txt"
    known = json.loads(record.read_text())
    assert known.pop("prompt_chunks") == 1
    record.write_text(json.dumps(known))  # as of a version that did not know them
    train("older", **common)
    (tmp_path / "class" / "class-000000.png").rename(tmp_path / "one.png")
    record.unlink()
    train("two", overwrite=True, prompt_chunks="auto", **common)
    assert not np.array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "class" / "class-000000.png"))


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_sample_card_and_helper_draw_what_training_drew(
    train: Train,
    captioned: Path,
    tmp_path: Path,
    xl: bool,
    train_text_encoder: bool,
    xl_folder: Path,
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = xl_folder if xl else base_folder
    run = train(
        pretrained_model_name_or_path=str(folder),
        instance_data_dir=captioned,
        instance_prompt=LONG,
        validation_prompt=LONG,
        prompt_chunks="auto",
        num_validation_images=1,
        resolution=64,
        train_text_encoder=train_text_encoder,
        learning_rate=0.1,
    )
    expected = samples(run)["step-000003/00.png"].astype(int)
    assert np.abs(expected - samples(run)["step-000000/00.png"]).max() > 10
    pipe = load_run(run)
    asked: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 64, "width": 64}
    dice = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    arguments = ether.encode_prompts(pipe, LONG, chunks=3)
    by_helper = np.asarray(pipe(**arguments, **asked, generator=dice()).images[0])
    assert np.abs(by_helper - expected).max() <= 1
    cut = np.asarray(pipe(LONG, **asked, generator=dice()).images[0])
    assert np.abs(cut - expected).max() > 1
    command = ["sample", str(run), "--seeds", "0", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    main(command)
    picture = tmp_path / "out" / "00-seed0-strength1.png"
    assert np.abs(pixels(picture) - expected).max() <= 1
    assert Image.open(picture).text["prompt_chunks"] == "3"  # type: ignore[attr-defined]
    block = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert block[1].rstrip().endswith(f'image = pipe(**ether.encode_prompts(pipe, "{LONG}", chunks=3)).images[0]')
    monkeypatch.chdir(run.parent)
    names: dict[str, Any] = {}
    *loading, _ = block[1].strip().splitlines()
    exec("\n".join(loading).replace(f"path/to/{folder.name}", str(folder)), names)
    card = names["pipe"]
    card.scheduler = pipe.scheduler
    drawn = card(**names["ether"].encode_prompts(card, LONG, chunks=3), **asked, generator=dice()).images[0]
    assert np.abs(np.asarray(drawn) - expected).max() <= 1


@pytest.mark.parametrize(
    "way", [{"method": "full", "learning_rate": 1e-3}, {"method": "lora"}, {"export_lora": "diffusers"}], ids=str
)
def test_the_code_of_every_card_encodes_in_chunks(
    train: Train, way: dict[str, Any], base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way.get("method") == "lora":
        pytest.importorskip("peft")
    run = train(prompt_chunks=2, instance_prompt=words(90), **way)
    blocks = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1 + ("export_lora" in way)
    monkeypatch.chdir(run.parent)
    for block in blocks:
        assert "chunks=2)" in block
        names: dict[str, Any] = {}
        exec(block.replace(f"path/to/{base_folder.name}", str(base_folder)), names)
        assert names["image"].size == (64, 64)


def test_the_comparison_with_a_lora_is_drawn_in_chunks(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = train(prompt_chunks=2, num_validation_images=1, resolution=64, export_lora="diffusers")
    lengths: list[int] = []
    original = StableDiffusion.drawing

    def drawing(family: Any, *arguments: Any) -> Any:
        found = original(family, *arguments)
        lengths.append(found["prompt_embeds"].shape[1])
        return found

    monkeypatch.setattr(StableDiffusion, "drawing", drawing)
    write_comparison(run, run / LORA_FILE, tmp_path / "page.html")
    assert lengths == [2 * 77] * 3


def test_runs_of_different_encodings_are_not_drawn_together(
    train: Train, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(train(f"run{chunks}", instance_data_dir=captioned, prompt_chunks=chunks)) for chunks in (1, 2)]
    with pytest.raises(SystemExit):
        main(["sample", *runs, "--prompts", "a dog", "--device", "cpu", "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "run2 encodes prompts with prompt_chunks=2" in said
    assert "run1 with prompt_chunks=1" in said


@pytest.mark.parametrize("verb", ["sample", "compare"])
def test_a_prompt_beyond_the_runs_chunks_is_told_in_drawing(
    verb: str, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(prompt_chunks=2)
    caplog.clear()
    command = [verb, str(run), "--prompts", LONG, "--seeds", "0", "--num_inference_steps", "1", "--device", "cpu"]
    more = ["--strengths", "0.5", "1"] if verb == "compare" else []
    main([*command, *more, "--output_dir", str(tmp_path / "out")])
    assert caplog.text.count("it does not see") == 1
    assert f'it does not see "{LONG.removeprefix(words(150)).strip()}"' in caplog.text


def test_a_damaged_number_of_chunks_is_named(train: Train) -> None:
    run = train(prompt_chunks=2)
    text = (run / "config.yaml").read_text()
    for damaged in ("many", "0", "1000000", "[2]"):
        (run / "config.yaml").write_text(text.replace("prompt_chunks: 2", f"prompt_chunks: {damaged}"))
        with pytest.raises(RunRecordError, match=r"config\.yaml is damaged: .*prompt_chunks"):
            _ = read_run(run).family_settings


@pytest.mark.parametrize("wrong", [0, -1, 65, "many"])
def test_an_impossible_number_of_chunks_is_refused(settings: Callable[..., DreamBoothConfig], wrong: Any) -> None:
    with pytest.raises(ValueError, match="prompt_chunks must be"):
        settings(prompt_chunks=wrong)


def test_a_family_without_chunks_refuses_them_by_name(
    settings: Callable[..., DreamBoothConfig], tmp_path: Path
) -> None:
    build("flux").save_pretrained(tmp_path / "flux")
    config = settings(pretrained_model_name_or_path=str(tmp_path / "flux"), prompt_chunks="auto")
    with pytest.raises(BaseModelError, match=r"prompt_chunks is no setting for FLUX\.1.*Stable Diffusion XL have it"):
        dreambooth.run(config)


def test_a_dry_run_counts_the_tokens_of_chunks(base_folder: Path, settings: Callable[..., DreamBoothConfig]) -> None:
    kept: dict[int | str, int] = {}
    for chunks in (1, 3, "auto"):
        config = settings(prompt_chunks=chunks)
        base = describe_base(config.section(BaseSection), "no")
        base.settings = config.family_settings
        latents = (base.latent_channels, base.vae_factor)
        kept[chunks] = int(plan(base, config.ether_config(), 32, latents).activations or 0)
        assert ("counted as one chunk" in report(base, config)) == (chunks == "auto")
    assert kept[3] > kept[1] == kept["auto"] > 0


def test_the_program_counts_them_in_a_dry_run(
    settings: Callable[..., DreamBoothConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[FamilySettings] = []
    monkeypatch.setattr(memory, "report", lambda family, config: counted.append(family.settings))
    run_program(settings(prompt_chunks=3, dry_run=True), dreambooth.run)
    assert counted == [FamilySettings(prompt_chunks=3)]
