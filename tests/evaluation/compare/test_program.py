"""``ether compare``: every column is what its run or file draws, and the page shows them side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ether_diffusion as ether
from ether_diffusion.cli import main
from ether_diffusion.runs.drawing import load_pipeline, load_run
from ether_diffusion.runs.record import read_run

Train = Callable[..., Path]
ASKED = ["--prompts", "a dog", "a cat", "--seeds", "3", "5", "--num_inference_steps", "2", "--device", "cpu"]


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


def drawn(pipe: Any, prompt: str, seed: int, run: Path) -> np.ndarray[Any, Any]:
    """By diffusers alone, one picture at a time."""
    config = read_run(run).config
    side, guidance = int(str(config["resolution"])), float(str(config["guidance_scale"]))
    rng = torch.Generator().manual_seed(seed)
    image = pipe(prompt, height=side, width=side, num_inference_steps=2, guidance_scale=guidance, generator=rng)
    return np.asarray(image.images[0], dtype=np.int16)


def compare(*arguments: object) -> None:
    main(["compare", *map(str, arguments)])


def test_runs_files_and_the_base_are_drawn_from_the_same_noise(train: Train, tmp_path: Path) -> None:
    """Another run, an adapter file, an exported LoRA of the first run, the base: each as its own pipeline draws it."""
    one = train("one", method="ether_plus", learning_rate=0.3, seed=1)
    two = train("two", method="ether", learning_rate=0.3, seed=2)
    file = tmp_path / "copy" / "kept.safetensors"
    file.parent.mkdir()
    file.write_bytes((two / "ether_weights.safetensors").read_bytes())
    lora = tmp_path / "lora.safetensors"
    ether.export_lora(one, lora, dtype="float32")
    out = tmp_path / "out"
    compare(one, two, file, lora, *ASKED, "--output_dir", out)
    base, first, second = load_pipeline(read_run(one).source), load_run(one), load_run(two)
    pictures = out / "pictures"
    for number, prompt in enumerate(("a dog", "a cat")):
        for seed in (3, 5):
            found = [pixels(pictures / f"{number:02d}-seed{seed}-{place:02d}.png") for place in range(5)]
            for place, pipe in ((0, base), (1, first), (2, second)):
                expected = drawn(pipe, prompt, seed, one)
                assert np.abs(found[place] - expected).max() <= 2, "a batch rounds otherwise than one picture"
            assert np.array_equal(found[2], found[3])  # the file is the second run's
            assert np.abs(found[1] - found[4]).max() <= 1  # the LoRA is the first run's
            assert min(np.abs(found[a] - found[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 10
    assert len(list(pictures.iterdir())) == 20
    told = Image.open(pictures / "01-seed5-04.png").text  # type: ignore[attr-defined]
    assert (told["prompt"], told["seed"], told["column"]) == ("a cat", "5", "lora.safetensors")
    assert str(tmp_path) not in str(told)


def test_one_run_at_several_strengths(train: Train, tmp_path: Path) -> None:
    run = train(method="ether_plus", learning_rate=0.3)
    out = tmp_path / "out"
    compare(run, *ASKED, "--strengths", "0.5", "1", "--output_dir", out)
    pipe = load_run(run)
    for place, strength in ((1, 0.5), (2, 1.0)):
        ether.set_adapters(pipe, "default", strength)
        assert np.abs(pixels(out / "pictures" / f"00-seed3-{place:02d}.png") - drawn(pipe, "a dog", 3, run)).max() <= 2
    page = (out / "compare.html").read_text()
    assert [f"run, strength {strength}" in page for strength in ("0.5", "1")] == [True, True]
    assert 'alt="run, strength 0.5: a cat, seed 5"' in page
    assert 'alt="Base model: a cat, seed 5"' in page


def test_a_lora_has_strengths_too(train: Train, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = train(method="lora", learning_rate=0.3)
    out = tmp_path / "out"
    compare(run, *ASKED, "--strengths", "1", "1e-9", "--output_dir", out)
    base, one, none = (pixels(out / "pictures" / f"00-seed3-{place:02d}.png") for place in range(3))
    assert np.abs(base - one).max() > 10
    assert np.abs(base - none).max() <= 1


def test_the_best_step_is_compared_by_its_folder(train: Train, tmp_path: Path) -> None:
    run = train(method="ether", learning_rate=0.3)
    (run / "best").mkdir()
    (run / "best" / "ether_weights.safetensors").write_bytes((run / "ether_weights.safetensors").read_bytes())
    out = tmp_path / "out"
    compare(run, run / "best", *ASKED, "--output_dir", out)
    assert np.array_equal(*(pixels(out / "pictures" / f"00-seed3-{place:02d}.png") for place in (1, 2)))


def test_two_runs_with_one_token_are_compared(train: Train, tmp_path: Path) -> None:
    token = {"placeholder_token": "<dog>", "num_vectors": 2, "token_lr": 0.3, "learning_rate": 0.3, "seed": 1}
    said = {"instance_prompt": "a photo of <dog> x", "validation_prompt": "a photo of <dog> x"}
    runs = [train(name, method="ether", num_validation_images=1, **token | said) for name in ("one", "two")]
    out = tmp_path / "out"
    compare(*runs, runs[0] / "ether_weights.safetensors", "--seeds", 0, "--output_dir", out)
    base, *drawn = (pixels(out / "pictures" / f"00-seed0-{place:02d}.png") for place in range(4))
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])  # the file's embeddings lie beside it
    assert np.abs(drawn[0].astype(int) - pixels(runs[0] / "samples" / "step-000003" / "00.png")).max() <= 1
    assert not np.array_equal(base, drawn[0])


def test_an_exported_lora_is_drawn_with_its_token_and_not_without(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    token = {"placeholder_token": "<dog>", "num_vectors": 2, "token_lr": 0.3, "learning_rate": 0.3}
    said = {"instance_prompt": "a photo of <dog> x", "validation_prompt": "a photo of <dog> x"}
    run = train(method="ether", num_validation_images=1, **token | said)
    lora, embeds = tmp_path / "lora.safetensors", tmp_path / "lora.learned_embeds.safetensors"
    ether.export_lora(run, lora, dtype="float32")
    compare(run, lora, "--seeds", 0, "--output_dir", tmp_path / "out")
    base, mine, exported = (pixels(tmp_path / "out" / "pictures" / f"00-seed0-{place:02d}.png") for place in range(3))
    assert np.abs(mine.astype(int) - exported).max() <= 1
    assert np.abs(mine.astype(int) - base).max() > 10
    embeds.rename(tmp_path / "away")
    with pytest.raises(SystemExit):
        compare(run, lora, "--seeds", 0, "--output_dir", tmp_path / "again")
    assert f"put {embeds.name} there" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_hostile_names_and_prompts_are_text(train: Train, tmp_path: Path) -> None:
    hostile = "\"'><img src=x onerror=alert(1)>{{ 'jin' ~ 'ja!' }}"
    run, other = train("one", method="ether"), train("<b>two", method="ether", seed=2)
    arguments = ["--prompts", hostile, "--seeds", "3", "--num_inference_steps", "1", "--device", "cpu"]
    compare(run, other, *arguments, "--output_dir", tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    for raw in ("<img src=x", "<b>two", "jinja!"):
        assert raw not in page
    assert "&lt;b&gt;two" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "1 columns beside the base: name 2 to 12"),
        (["RUN", "RUN"], "is named twice"),
        (["RUN", "NOTHING"], "nothing is neither a run folder nor a .safetensors file"),
        (["FILE", "RUN"], "is no run folder: name one first"),
        (["RUN", "BROKEN"], "broken.safetensors"),
        (["RUN", "--strengths", "0", "1"], "strength 0 is the base"),
        (["RUN", "--strengths", *map(str, range(1, 15))], "14 columns beside the base"),
        (["RUN", "FILE", "--output_dir", "RUN"], "is there already"),
        (["RUN", "FILE", "--prompts", ""], "there is no prompt"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_drawn(
    arguments: list[str], message: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(method="ether")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    places = {"RUN": run, "FILE": run / "ether_weights.safetensors", "NOTHING": tmp_path / "nothing"}
    places |= {"BROKEN": tmp_path / "broken.safetensors"}
    out = [] if "--output_dir" in arguments else ["--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as ended:
        compare(*(places.get(each, each) for each in arguments), *out, "--device", "cpu")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_runs_on_two_bases_and_runs_with_a_control_are_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = train("one", method="ether"), train("two", method="ether", seed=2)
    config = other / "config.yaml"
    for change, message in (
        (("revision: null", "revision: older"), "give runs on one base"),
        (("control: null", "control: encoder"), "whose pictures need conditions"),
    ):
        kept = config.read_text()
        config.write_text(kept.replace(*change) if change[0] in kept else f"{kept}\n{change[1]}\n")
        with pytest.raises(SystemExit):
            compare(run, other, *ASKED, "--output_dir", tmp_path / "out")
        assert message in capsys.readouterr().err
        config.write_text(kept)


def test_a_lora_of_another_model_is_refused_instead_of_ignored(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(method="ether")
    ether.export_lora(run, tmp_path / "lora.safetensors")
    renamed = {
        key.replace("unet.", "transformer."): each for key, each in load_file(tmp_path / "lora.safetensors").items()
    }
    save_file(renamed, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit):
        compare(run, tmp_path / "other.safetensors", *ASKED, "--output_dir", tmp_path / "out")
    assert "diffusers finds no layer" in capsys.readouterr().err
    assert not (tmp_path / "out" / "compare.html").exists()


def test_the_record_says_which_adapters_were_compared(train: Train, tmp_path: Path) -> None:
    run = train(method="ether")
    file = run / "ether_weights.safetensors"
    compare(run, file, *ASKED, "--output_dir", tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["config_hash"] in page
    assert "SHA-256" in page
    assert str(tmp_path) not in page
