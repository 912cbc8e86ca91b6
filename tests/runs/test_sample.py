"""``ether sample``: pictures at several strengths, of several adapters, that say how they were drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ether_diffusion as ether
from ether_diffusion.cli import main
from ether_diffusion.runs.drawing import load_pipeline, load_run
from ether_diffusion.runs.record import read_run

Train = Callable[..., Path]
ASKED = ["--prompts", "a dog", "--num_inference_steps", "2", "--guidance_scale", "3", "--device", "cpu"]


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


def drawn(pipe: Any, prompt: str, seed: int, side: int) -> np.ndarray[Any, Any]:
    dice = torch.Generator().manual_seed(seed)
    image = pipe(prompt, height=side, width=side, num_inference_steps=2, guidance_scale=3, generator=dice).images[0]
    return np.asarray(image, dtype=np.int16)


def test_every_strength_is_the_pipelines(train: Train, tmp_path: Path) -> None:
    run = train(method="ether_plus", learning_rate=0.3)
    main(
        [
            "sample",
            str(run),
            *ASKED,
            "--seeds",
            "3",
            "5",
            "--strengths",
            "0",
            "0.5",
            "1",
            "--output_dir",
            str(tmp_path / "out"),
        ]
    )
    side = int(str(read_run(run).config["resolution"]))
    pipe, base = load_run(run), load_pipeline(read_run(run).source)
    for strength in (0.0, 0.5, 1.0):
        if strength:
            ether.set_adapters(pipe, "default", strength)
        for seed in (3, 5):
            found = pixels(tmp_path / "out" / f"00-seed{seed}-strength{strength:g}.png")
            expected = drawn(pipe if strength else base, "a dog", seed, side)
            assert np.abs(found - expected).max() <= 2, "a batch rounds otherwise than one picture"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"grid-00.png", "prompts.txt"} < names
    assert len(names) == 8
    half, whole = (pixels(tmp_path / "out" / f"00-seed3-strength{s}.png") for s in ("0.5", "1"))
    assert np.abs(half - whole).max() > 10


def test_a_picture_says_how_it_was_drawn(train: Train, tmp_path: Path) -> None:
    run = train(method="ether")
    main(["sample", str(run), *ASKED, "--seeds", "7", "--output_dir", str(tmp_path / "out")])
    told = Image.open(tmp_path / "out" / "00-seed7-strength1.png").text  # type: ignore[attr-defined]
    assert told["prompt"] == "a dog"
    assert (told["seed"], told["strength"], told["steps"], told["guidance_scale"]) == ("7", "1.0", "2", "3.0")
    assert json.loads(told["adapters"]) == [{"run": run.name, "weight": 1.0}]
    assert told["dtype"] == "float32"
    assert str(tmp_path) not in str(told)


def test_several_adapters_add_up(train: Train, tmp_path: Path) -> None:
    runs = [train(name, method="ether", learning_rate=0.3, seed=seed) for seed, name in enumerate(("one", "two"))]
    arguments = [
        *map(str, runs),
        *ASKED,
        "--seeds",
        "3",
        "--weights",
        "1",
        "-0.5",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    main(["sample", *arguments])
    pipe = load_pipeline(read_run(runs[0]).source)
    for name, run in zip("ab", runs, strict=True):
        ether.load(pipe, run, name)
    ether.set_adapters(pipe, ["a", "b"], [1.0, -0.5])
    side = int(str(read_run(runs[0]).config["resolution"]))
    expected = drawn(pipe, "a dog", 3, side)
    assert np.abs(pixels(tmp_path / "out" / "00-seed3-strength1.png") - expected).max() <= 1


def test_each_prompt_may_have_an_adapter_of_its_own(train: Train, tmp_path: Path) -> None:
    runs = [train(name, method="ether", learning_rate=0.3, seed=seed) for seed, name in enumerate(("one", "two"))]
    arguments = [*map(str, runs), "--per_prompt", "--seeds", "3", *ASKED, "--output_dir", str(tmp_path / "out")]
    arguments[arguments.index("a dog") : arguments.index("a dog") + 1] = ["a dog", "a cat"]
    main(["sample", *arguments])
    side = int(str(read_run(runs[0]).config["resolution"]))
    for number, (run, prompt) in enumerate(zip(runs, ("a dog", "a cat"), strict=True)):
        expected = drawn(load_run(run), prompt, 3, side)
        picture = Image.open(tmp_path / "out" / f"0{number}-seed3-strength1.png")
        assert json.loads(picture.text["adapters"]) == [{"run": run.name, "weight": 1.0}]  # type: ignore[attr-defined]
        assert np.abs(pixels(tmp_path / "out" / f"0{number}-seed3-strength1.png") - expected).max() <= 1


def test_without_prompts_the_runs_own_are_drawn(train: Train, tmp_path: Path) -> None:
    run = train(method="ether", validation_prompt=["a qwe dog in snow"], num_validation_images=1)
    arguments = ["--num_inference_steps", "2", "--seeds", "0", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    main(["sample", str(run), *arguments])
    assert (tmp_path / "out" / "prompts.txt").read_text() == "a qwe dog in snow\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--strengths", "many"], "is not a number"),
        (["run", "--weights", "1", "2"], "1 runs and 2 weights"),
        (["run", "--per_prompt", "--prompts", "a", "b"], "per_prompt needs a prompt for each run"),
        (["run", "--control_image", "map.png"], "learnt no control: leave out --control_image"),
        (["run", "--output_dir", "."], "is there already"),
        (["nothing"], "nothing"),
        (["run", "--prompts", "a", "--prompts_file", "b.txt"], "not both"),
        (["run", "--prompts", ""], "there is no prompt"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = train(method="ether")
    monkeypatch.chdir(tmp_path)
    given = [str(run) if each == "run" else each for each in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["sample", *given, "--device", "cpu"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said


def test_strengths_are_for_adapters_of_this_library(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    run = train(method="lora")
    arguments = ["sample", str(run), *ASKED, "--seeds", "3", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([*arguments, "--weights", "0.5"])
    assert "is LoRA, which is drawn at strength 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--strengths", "0.5"])
    assert "is LoRA, which is drawn at strength 1" in capsys.readouterr().err
    main(arguments)
    assert (tmp_path / "out" / "00-seed3-strength1.png").is_file()


def test_an_output_folder_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(SystemExit) as ended:
        main(["sample", "run", "--output_dir", str(tmp_path)])
    assert ended.value.code == 2
    assert "Permission denied" in (said := capsys.readouterr().err)
    assert "name another --output_dir" in said
