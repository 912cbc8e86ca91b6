"""``ether export``: a run's adapter as a LoRA file, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import ether_diffusion as ether
from ether_diffusion.cli import main
from ether_diffusion.runs.drawing import load_pipeline, load_run
from ether_diffusion.runs.record import read_run

Train = Callable[..., Path]


def test_a_run_is_exported_and_draws_the_same(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(method="ether_plus", learning_rate=0.3, train_text_encoder=True)
    main(["export", str(run), str(tmp_path / "lora.safetensors"), "--format", "kohya", "--dtype", "float32"])
    assert "lora.safetensors: " in (said := capsys.readouterr().out)
    assert "format kohya" in said
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.title"] == run.name
    assert header["modelspec.trigger_phrase"] == read_run(run).instance_prompt
    mine, base = load_run(run), load_pipeline(read_run(run).source)
    stock = load_pipeline(read_run(run).source)
    stock.load_lora_weights(str(tmp_path / "lora.safetensors"))

    def draw(pipe: object) -> torch.Tensor:
        dice = torch.Generator().manual_seed(0)
        return pipe("a dog", num_inference_steps=2, output_type="latent", generator=dice).images  # type: ignore[operator]

    effect = float((draw(mine) - draw(base)).abs().max())
    assert effect > 1e-3
    torch.testing.assert_close(draw(stock), draw(mine), rtol=0, atol=1e-3 * effect + 1e-5)


def test_a_page_shows_both(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(method="ether_plus", learning_rate=0.3, num_validation_images=2, num_inference_steps=2)
    page = tmp_path / "page.html"
    main(["export", str(run), str(tmp_path / "lora.safetensors"), "--dtype", "float32", "--page", str(page)])
    said = capsys.readouterr().out.splitlines()[-1]
    largest = int(said.split("differ by ")[1].split()[0])
    assert largest <= 1  # of 255, where both are rounded
    text = page.read_text()
    assert text.count("data:image/webp") == 3 * 2
    assert f"adapter to LoRA: {largest} of 255" in text
    effects = [int(part.split()[0]) for part in text.split("base to adapter: ")[1:]]
    assert min(effects) > 10


def test_a_page_is_of_the_strength_that_was_exported(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(method="ether_plus", learning_rate=0.3, num_validation_images=1, num_inference_steps=2)
    given = [str(run), str(tmp_path / "lora.safetensors"), "--dtype", "float32", "--page", str(tmp_path / "page.html")]
    main(["export", *given, "--strength", "0.3"])
    assert int(capsys.readouterr().out.splitlines()[-1].split("differ by ")[1].split()[0]) <= 1


def test_a_page_that_cannot_be_drawn_is_told_before_anything_is_written(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(method="ether", num_validation_images=0)
    with pytest.raises(SystemExit):
        main(["export", str(run), str(tmp_path / "lora.safetensors"), "--page", str(tmp_path / "page.html")])
    assert "there are no prompts to compare" in capsys.readouterr().err
    assert not (tmp_path / "lora.safetensors").exists()


def test_the_report_links_what_was_written(train: Train) -> None:
    run = train(method="ether", export_lora="diffusers")
    report = (run / "report.html").read_text()
    assert '<a href="pytorch_lora_weights.safetensors">' in report
    assert '<a href="ether_weights.safetensors">' in report


def test_the_base_may_be_loaded_in_half_precision(train: Train, tmp_path: Path) -> None:
    run = train(method="ether")
    made = ether.export_lora(run, tmp_path / "lora.safetensors", base_dtype="bfloat16")
    assert made.verified.difference < 1e-3


def test_a_pipeline_is_exported_from_python(train: Train, tmp_path: Path) -> None:
    run = train(method="ether")
    from_run = ether.export_lora(run, tmp_path / "run.safetensors")
    from_pipe = ether.export_lora(load_run(run), tmp_path / "pipe.safetensors")
    assert (from_run.layers, from_run.rank, from_run.size > 0) == (from_pipe.layers, 4, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "lora.safetensors"], "nothing"),
        (["run", "there.safetensors"], "there already"),
        (["run", "lora.safetensors", "--format", "a1111"], "invalid choice"),
        (["run", "lora.ckpt"], "must end in .safetensors"),
        (["run", "no/such/folder/lora.safetensors"], ""),
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
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    given = [str(run) if each == "run" else each for each in arguments]
    if message:
        with pytest.raises(SystemExit) as ended:
            main(["export", *given])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    else:  # folders are made
        main(["export", *given])
        assert (tmp_path / given[1]).is_file()
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_a_lora_run_has_its_file_already(train: Train, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = train(method="lora")
    with pytest.raises(ValueError, match="method=lora: what is exported is ETHER and ETHER"):
        ether.export_lora(run, tmp_path / "lora.safetensors")
