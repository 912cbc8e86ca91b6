"""``examples/trl_sft.py``: TRL's trainer on a tiny Llama, the adapter loaded again, vectors that stay fp32."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

pytest.importorskip("trl", reason='TRL is not installed: pip install -e ".[trl]"')

RECORDS = [
    {"prompt": f"what colour has the {thing} :", "completion": f" {colour}"}
    for thing, colour in (("sky", "blue"), ("grass", "green"), ("snow", "white"))
]


@pytest.fixture
def trl_sft() -> ModuleType:
    return importlib.import_module("trl_sft")


def logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(RECORDS[0]["prompt"], return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_a_run_learns_and_its_folder_loads_again(
    trl_sft: ModuleType,
    llama_folder: Path,
    write: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = write("sft.jsonl", RECORDS), tmp_path / "out"  # type: ignore[operator]
    given = f"--model {llama_folder} --data {data} --output {out} --steps 30 --learning_rate 3e-2"
    monkeypatch.setattr(sys, "argv", ["trl_sft.py", *given.split()])
    trl_sft.main()
    printed = capsys.readouterr().out
    assert "trainable params: 1,024 " in printed  # 2 layers, 4 Linears of 32 x 32, four vectors of 32
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    first, *_, last = (entry["loss"] for entry in log if "loss" in entry)
    assert last < 0.5 * first
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype="float32")
    before = logits(base, llama_folder)
    again = peft.PeftModel.from_pretrained(base, out)
    assert (logits(again, llama_folder) - before).abs().max() > 0.1
    assert "import ether_diffusion.peft_tuner" in (out / "README.md").read_text()


def test_the_vectors_are_fp32_on_a_quantised_base_too(
    trl_sft: ModuleType, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL casts what is trained to bf16 where a model says that it is in four bits."""
    monkeypatch.setattr(LlamaForCausalLM, "is_loaded_in_4bit", True, raising=False)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype="float32")
    data = trl_sft.Dataset.from_list(RECORDS)
    options = argparse.Namespace(
        output=tmp_path, steps=1, batch_size=2, learning_rate=1e-3, variant="ether_plus", n_blocks=4
    )
    trainer = trl_sft.make_trainer(model, AutoTokenizer.from_pretrained(llama_folder), data, options)
    vectors = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {vector.dtype for vector in vectors} == {torch.float32}
    assert all(torch.equal(vector, vector.bfloat16().float()) for vector in vectors), "TRL has not cast them"
