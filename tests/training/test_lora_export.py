"""--export_lora: the exact LoRA beside the result, refused before the first step where it cannot be written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from training.helpers import provenance

import ether_diffusion as ether
from ether_diffusion.runs.drawing import load_run
from ether_diffusion.training import lora_export

pytest.importorskip("peft")
Train = Callable[..., Path]
LORA = "pytorch_lora_weights.safetensors"


def test_the_lora_is_what_the_run_exports(train: Train, tmp_path: Path) -> None:
    run = train(
        method="ether_plus",
        learning_rate=0.3,
        max_train_steps=2,
        export_lora="kohya",
        train_text_encoder=True,
        num_validation_images=1,
    )
    written = ether.export_lora(run, tmp_path / "again.safetensors", "kohya")
    with safe_open(run / LORA, "pt") as ours, safe_open(written.path, "pt") as again:
        assert set(ours.keys()) == set(again.keys())
        for key in ours.keys():  # noqa: SIM118
            assert (ours.get_tensor(key) == again.get_tensor(key)).all()
        told, expected = ours.metadata(), again.metadata()
    assert told["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert len(told["modelspec.thumbnail"]) < 40_000
    assert {key: value for key, value in told.items() if "date" not in key and key != "ether_export"} == {
        key: value for key, value in expected.items() if "date" not in key and key != "ether_export"
    }
    assert "load_lora_weights" in (run / "README.md").read_text()
    pipe = load_run(run)
    ether.unload(pipe)
    pipe.load_lora_weights(str(run))


def test_an_older_lora_does_not_stay_beside_a_newer_adapter(train: Train) -> None:
    settings = {"method": "ether", "checkpointing_steps": 1}
    run = train(**settings, max_train_steps=1, export_lora="diffusers")
    assert (run / LORA).is_file()
    train(**settings, max_train_steps=2, resume="latest")
    assert not (run / LORA).exists()
    assert "load_lora_weights" not in (run / "README.md").read_text()


def test_what_readers_do_not_know_is_told_before_the_training(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ether.ExportError, match=r"know no name for unet.time_embedding.linear_1"):
        train("run", method="ether", targets="all", export_lora="kohya", max_train_steps=1)
    with pytest.raises(ether.ExportError, match="has no LoRA format 'original'"):
        train("run", method="ether", export_lora="original", max_train_steps=1)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("method", ["naive", "lora", "full"])
def test_other_methods_are_refused(method: str, train: Train) -> None:
    with pytest.raises(ValueError, match=f"ether, ether_plus, anchored, ether_plus_free learn.* not method={method}"):
        train(method=method, export_lora="diffusers")


def test_a_quantised_base_is_refused(train: Train) -> None:
    with pytest.raises(ValueError, match="which base_quantization changes"):
        train(method="ether", export_lora="diffusers", base_quantization="fp8-storage")


def test_a_lora_that_cannot_be_written_costs_no_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(lora_export, "export_beside", full)
    with caplog.at_level(logging.ERROR):
        run = train(method="ether", max_train_steps=1, export_lora="diffusers")
    (record,) = [record for record in caplog.records if record.name == lora_export.__name__]
    assert "no space left on device. The run is complete; `ether export" in record.getMessage()
    assert provenance(run)["status"] == "finished"
    assert not (run / LORA).exists()
