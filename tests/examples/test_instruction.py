"""``examples/instruction.py``: its counts, what the loss is on, and a whole run on a tiny Llama."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from examples_language import losses
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
RECORDS = [
    {"instruction": f"what colour has the {thing}", "input": about, "output": colour}
    for thing, colour in (("sky", "blue"), ("grass", "green"), ("snow", "white"))
    for about in ("", "say it .")
]


@pytest.fixture
def instruction() -> ModuleType:
    return importlib.import_module("instruction")


def settings(instruction: ModuleType, base: Path, data: Path, out: Path, **more: object) -> object:
    given = {"model": str(base), "train_file": data, "output_dir": out, "max_steps": 40, "batch_size": 4,
             "micro_batch_size": 2, "n_blocks": 4, "learning_rate": 3e-2, "dtype": "float32"}  # fmt: skip
    return instruction.InstructionConfig(**{**given, **more})


@pytest.mark.parametrize(("method", "expected"), [("ether", 262_144), ("ether_plus", 1_048_576)])
def test_the_trained_numbers_are_the_papers(instruction: ModuleType, method: str, expected: int) -> None:
    assert instruction.count(instruction.InstructionConfig(method=method)) == expected


def test_the_recipe_has_the_authors_settings(
    instruction: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["--config", str(ROOT / "examples" / "instruction.yaml")]
    config = instruction.parse_config(instruction.InstructionConfig, recipe)
    assert (config.learning_rate, config.batch_size, config.micro_batch_size, config.epochs) == (1e-3, 16, 1, 1)
    assert (config.max_length, config.n_blocks, config.dtype, config.weight_decay) == (256, 32, "bfloat16", 0)
    monkeypatch.setattr(sys, "argv", ["instruction.py", *recipe, "--method", "ether", "--count"])
    instruction.main()
    assert capsys.readouterr().out == "ether: 262,144 trained numbers\n"


@pytest.mark.parametrize("method", ["ether", "ether_plus", "lora"])
def test_a_run_learns_and_its_folder_loads_again(
    instruction: ModuleType, method: str, llama_folder: Path, write: object, tmp_path: Path
) -> None:
    data, out = write("alpaca.jsonl", RECORDS), tmp_path / "out"  # type: ignore[operator]
    model = instruction.finetune(settings(instruction, llama_folder, data, out, method=method))
    assert losses(out)[-1] < 0.5 * losses(out)[0]
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype="float32")
    again = peft.PeftModel.from_pretrained(base, out).eval()
    prompt = instruction.prompt_of(RECORDS[1])
    ids = AutoTokenizer.from_pretrained(out)(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=0, atol=0)
        with again.disable_adapter():
            assert (again(input_ids=ids).logits - expected).abs().max() > 0.1


def test_a_bf16_base_has_fp32_vectors(
    instruction: ModuleType, llama_folder: Path, write: object, tmp_path: Path
) -> None:
    data = write("alpaca.jsonl", RECORDS)  # type: ignore[operator]
    out = tmp_path / "out"
    model = instruction.finetune(settings(instruction, llama_folder, data, out, dtype="bfloat16"))
    kinds = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert losses(out)[-1] < 0.5 * losses(out)[0]


def test_checkpointing_changes_nothing(
    instruction: ModuleType, llama_folder: Path, write: object, tmp_path: Path
) -> None:
    data = write("alpaca.jsonl", RECORDS)  # type: ignore[operator]
    for name, on in (("plain", False), ("checkpointed", True)):
        model = instruction.finetune(
            settings(instruction, llama_folder, data, tmp_path / name, max_steps=11, gradient_checkpointing=on)
        )
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == on
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "checkpointed"), rel=1e-5)


@pytest.mark.slow
def test_two_processes_share_a_batch(llama_folder: Path, write: object, tmp_path: Path) -> None:
    """Each takes half of every batch of four: three records an epoch, two of them in its first step."""
    data, out = write("alpaca.jsonl", RECORDS), tmp_path / "out"  # type: ignore[operator]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = f"--model {llama_folder} --train_file {data} --output_dir {out} --max_steps 10 --batch_size 4 --n_blocks 4"
    ended = subprocess.run(
        [*launcher, str(ROOT / "examples" / "instruction.py"), *given.split(), "--dtype", "float32"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout.count(f"saved in {out}") == 1
    log = json.loads((out / "results.json").read_text())["log"]
    assert log[-1]["epoch"] == 5.0  # two steps an epoch; three if each process had all records


def test_the_loss_is_on_the_response(instruction: ModuleType, llama_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    config = instruction.InstructionConfig()
    found = instruction.tokens_of(RECORDS[0], tokenizer, config)
    targets = [token for token in found["labels"] if token != instruction.IGNORED]
    assert tokenizer.convert_ids_to_tokens(targets) == ["blue", "</s>"]
    assert found["input_ids"][: -len(targets)] == tokenizer(instruction.prompt_of(RECORDS[0])).input_ids
    whole = instruction.tokens_of(RECORDS[0], tokenizer, instruction.InstructionConfig(train_on_prompts=True))
    assert whole["labels"] == whole["input_ids"] == found["input_ids"]


def test_what_is_too_long_is_cut_or_left_out(instruction: ModuleType, llama_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    prompt = len(tokenizer(instruction.prompt_of(RECORDS[0])).input_ids)
    long = {**RECORDS[0], "output": "blue blue blue blue"}
    cut = instruction.tokens_of(long, tokenizer, instruction.InstructionConfig(max_length=prompt + 2))
    assert tokenizer.convert_ids_to_tokens(cut["input_ids"][prompt:]) == ["blue", "blue"]
    config = instruction.InstructionConfig(max_length=prompt)
    assert instruction.tokens_of(long, tokenizer, config) is None
    with pytest.raises(importlib.import_module("language_settings").InputError, match="give a larger one"):
        instruction.examples_of([long], tokenizer, config)
    short = {**RECORDS[0], "instruction": "say"}
    assert instruction.examples_of([long, short], tokenizer, config)[1] == 1


def test_a_list_of_json_is_read_like_lines(instruction: ModuleType, write: object, tmp_path: Path) -> None:
    lines = write("alpaca.jsonl", RECORDS)  # type: ignore[operator]
    (tmp_path / "alpaca.json").write_text(json.dumps(RECORDS))
    first, second = (
        instruction.read_data(instruction.InstructionConfig(train_file=path))
        for path in (lines, tmp_path / "alpaca.json")
    )
    assert first == second == RECORDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file", "bad.jsonl"], 'bad.jsonl, record 1: "input" must be of type str'),
        (["--train_file", "broken.jsonl"], "broken.jsonl cannot be read as JSON lines or a JSON list"),
        (["--train_file", "good.jsonl", "--model", "llama", "--n_blocks", "5"], "n_blocks"),
        ([], "nobody/nothing cannot be loaded"),
        (["--dtype", "float16"], "dtype"),
    ],
)
def test_a_mistake_is_one_line(
    instruction: ModuleType,
    arguments: list[str],
    message: str,
    llama_folder: Path,
    write: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(instruction, "HUB_DATA", "nobody/nothing")
    write("good.jsonl", RECORDS)  # type: ignore[operator]
    write("bad.jsonl", [{"instruction": "say it", "output": "blue"}])  # type: ignore[operator]
    (tmp_path / "broken.jsonl").write_text('{"instruction": ')
    monkeypatch.setattr(sys, "argv", ["instruction.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("language_settings").run(instruction.main)
    assert message in str(ended.value)
    assert str(ended.value).startswith("instruction.py: ")
    assert "\n" not in str(ended.value)
